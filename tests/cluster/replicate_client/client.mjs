// Replicate's client for JavaScript, unchanged, against a base URL: prints what it saw as one line of JSON.
import { createServer } from "node:http";
import { once } from "node:events";
import Replicate, { validateWebhook } from "replicate";

const replicate = new Replicate({ auth: process.env.REPLICATE_API_TOKEN, baseUrl: process.env.BASE_URL });
const model = "someone/some-model";
const seen = {};

const progress = [];
await replicate.run(model, { input: { prompt: "slow", steps: 2 }, wait: { mode: "block", timeout: 1 } }, (p) => progress.push(p.status));
seen.progress = progress;

try {
  await replicate.run(model, { input: { prompt: "fail" } });
} catch (error) {
  seen.failure = error.message;
}
try {
  await replicate.predictions.create({ model, input: { prompt: "a", steps: 1000 } });
} catch (error) {
  seen.refused = [error.response.status, error.message.includes("1000 is greater than the maximum of 50")];
}

const started = await replicate.predictions.create({ model, input: { prompt: "slow", steps: 50 } });
const canceled = await replicate.predictions.cancel(started.id);
seen.canceled = (await replicate.wait(canceled, {})).status;

const file = await replicate.files.create(Buffer.from("pixels"));
seen.file = (await replicate.files.get(file.id)).size;
seen.deleted = await replicate.files.delete(file.id);

seen.stream = [];
for await (const { event } of replicate.stream(model, { input: { prompt: "a" } })) {
  if (seen.stream.at(-1) !== event) seen.stream.push(event);
}

const secret = (await replicate.webhooks.default.secret.get()).key;
const server = createServer();
server.listen(0, "127.0.0.1");
await once(server, "listening");
const received = new Promise((resolve) => {
  const events = [];
  server.on("request", async (request, response) => {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    const body = Buffer.concat(chunks).toString();
    response.end();
    const valid = await validateWebhook({ headers: request.headers, body }, secret);
    const forged = await validateWebhook({ headers: request.headers, body: body + " " }, secret);
    const { status } = JSON.parse(body);
    events.push([status, valid, forged]);
    if (status === "succeeded") resolve(events);
  });
});
await replicate.predictions.create({
  model,
  input: { prompt: "a" },
  webhook: `http://127.0.0.1:${server.address().port}/hook`,
  webhook_events_filter: ["start", "completed"],
});
seen.webhooks = await received;
server.close();

seen.account = (await replicate.accounts.current()).username;
seen.model = (await replicate.models.get("someone", "some-model")).latest_version.openapi_schema.openapi;
const deployed = await replicate.deployments.predictions.create("someone", "some-deployment", { input: { prompt: "a" }, wait: true });
seen.deployment = deployed.status;
console.log(JSON.stringify(seen));
process.exit(0);

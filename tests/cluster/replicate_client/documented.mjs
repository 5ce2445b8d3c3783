// What Replicate's documentation does with its client for JavaScript, as it does it; in the end a line of JSON is told.
import { once } from "node:events";
import { readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import Replicate, { validateWebhook } from "replicate";

const baseUrl = process.env.BASE_URL;
const replicate = new Replicate({ baseUrl });
const model = "someone/some-model";
const seen = {};

// Run a model, and save the first picture
const output = await replicate.run(model, { input: { prompt: "written" } });
await writeFile("written.webp", output[0]);

// Save all pictures; of a version, which is polled for
const outputs = await replicate.run(`${model}:abc`, { input: { prompt: "polled" }, wait: { mode: "poll", interval: 50 } });
for (const [index, item] of Object.entries(outputs)) {
  await writeFile(`polled_${index}.webp`, item);
}

// Where it is, and as a Blob
const [picture] = await replicate.run(model, { input: { prompt: "blob" } });
seen.url = picture.url().protocol;
const blob = await picture.blob();
seen.blob = [blob.type, await blob.text()];

// A file as an input, and an output as the next input
const [drawn] = await replicate.run(model, { input: { prompt: "a", image: await readFile("photo.png") } });
const [upscaled] = await replicate.run(model, { input: { prompt: "a", image: await drawn.blob() } });
await writeFile("upscaled.webp", upscaled);

// Strings instead of files
const strings = new Replicate({ baseUrl, useFileOutput: false });
seen.strings = await strings.run(model, { input: { prompt: "a", steps: 1 } });

// In the background
let prediction = await replicate.predictions.create({ model, input: { prompt: "slow", steps: 1 } });
seen.statuses = [prediction.status];
prediction = await replicate.predictions.get(prediction.id);
prediction = await replicate.wait(prediction);
seen.statuses.push(prediction.status);
seen.output = prediction.output;

// Events
const events = [];
for await (const { event, data } of replicate.stream(model, { input: { prompt: "streamed" } })) {
  if (event === "output") {
    events.push(data);
  }
}
seen.stream = events.join("").trim();
await writeFile("streamed.webp", events[0]);

// Pages
seen.listed = (await replicate.predictions.list()).results.filter(({ id }) => id === prediction.id).map(({ output }) => output);
seen.pages = 0;
for await (const page of replicate.paginate(replicate.predictions.list)) {
  seen.pages += page.length > 0 ? 1 : 0;
}

// A webhook
const secret = (await replicate.webhooks.default.secret.get()).key;
const server = createServer().listen(0, "127.0.0.1");
await once(server, "listening");
const url = `http://127.0.0.1:${server.address().port}/webhook`;
await replicate.predictions.create({ model, input: { prompt: "a" }, webhook: url, webhook_events_filter: ["completed"] });
const [incoming, response] = await once(server, "request");
const { method, headers } = incoming;
const request = new Request(url, { method, headers, body: incoming, duplex: "half" });
seen.valid = await validateWebhook(request.clone(), secret);
seen.webhook = (await request.json()).output;
response.end();
server.close();

console.log(JSON.stringify(seen));

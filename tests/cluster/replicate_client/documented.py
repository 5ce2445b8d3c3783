"""The examples of Replicate's documentation of its Python client; prints a line of JSON at the end."""
# ruff: noqa: PTH123, SIM115 (files are opened as there)

import asyncio
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import replicate
from replicate.webhook import Webhooks

model = "someone/some-model"
seen = {}

# Run a model, and save the first picture
output = replicate.run(model, input={"prompt": "read"})
with open("read.webp", "wb") as file:
    file.write(output[0].read())

# Save all pictures; of a version, which is polled for
outputs = replicate.run(f"{model}:{'0' * 64}", input={"prompt": "polled"}, wait=False)
for index, output in enumerate(outputs):
    with open(f"polled_{index}.webp", "wb") as file:
        file.write(output.read())

# Stream the file
[output] = replicate.run(model, input={"prompt": "chunks"})
with open("chunks.webp", "wb") as file:
    for chunk in output:
        file.write(chunk)

# A file as an input, and an output as the next input
[output] = replicate.run(model, input={"prompt": "a", "image": open("photo.png", "rb")})
[upscaled] = replicate.run(model, input={"prompt": "a", "image": output.url})
with open("upscaled.webp", "wb") as file:
    file.write(upscaled.read())

# Strings instead of files
seen["strings"] = replicate.run(model, input={"prompt": "a", "steps": 1}, use_file_output=False)

# In the background
prediction = replicate.predictions.create(model=model, input={"prompt": "slow", "steps": 1})
seen["statuses"] = [prediction.status]
prediction.reload()
prediction.wait()
seen["statuses"].append(prediction.status)
seen["output"] = prediction.output

# Events
seen["stream"] = ""
for event in replicate.stream(model, input={"prompt": "a"}):
    seen["stream"] += str(event)
prediction = replicate.predictions.create(model=model, input={"prompt": "a"}, stream=True)
seen["events"] = "".join(str(event) for event in prediction.stream())

# Pages
page = replicate.predictions.list()
seen["listed"] = [listed.output for listed in page.results if listed.id == prediction.id]
if page.next:
    page = replicate.predictions.list(page.next)
seen["pages"] = sum(len(page.results) > 0 for page in replicate.paginate(replicate.predictions.list))


# A webhook
class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        secret = replicate.webhooks.default.secret()
        Webhooks.validate(headers=dict(self.headers), body=body, secret=secret, tolerance=60)
        seen["webhook"] = json.loads(body)["output"]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


with HTTPServer(("127.0.0.1", 0), Receiver) as server:
    server.timeout = 30
    replicate.predictions.create(
        model=model,
        input={"prompt": "a"},
        webhook=f"http://127.0.0.1:{server.server_port}/webhook",
        webhook_events_filter=["completed"],
    )
    server.handle_request()


async def main() -> None:
    """The same with asyncio."""
    [output] = await replicate.async_run(model, input={"prompt": "aread"})
    with open("aread.webp", "wb") as file:
        file.write(await output.aread())
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(replicate.async_run(model, input={"prompt": f"{count} unicorns"}))
            for count in ["two", "four"]
        ]
    for index, task in enumerate(tasks):
        [output] = task.result()
        with open(f"achunks_{index}.webp", "wb") as file:
            async for chunk in output:
                file.write(chunk)
    seen["astream"] = ""
    async for event in await replicate.async_stream(model, input={"prompt": "a"}):
        seen["astream"] += str(event)


asyncio.run(main())
print(json.dumps(seen))

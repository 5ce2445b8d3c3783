"""Databases that an earlier version of the cluster has written, before a front became many modules, go on as they are.

In each are, of both APIs, predictions that wait, run, are to be cancelled, have ended in every way, or have still to
tell their end; an upload, two outputs, the secret of webhooks, and the front that was killed.
"""

import json

import pytest

pytest.importorskip("sqlalchemy", reason="the cluster needs cluster/requirements.txt")

from cluster.predictions import Predictions, now
from tests.cluster import databases

SHOWN = {"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}
SECRET = SHOWN | {"replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}
UNFINISHED = {"waiting": "starting", "processing": "processing", "unwanted": "starting"}
ENDED = {"succeeded": "succeeded", "failed": "failed", "canceled": "canceled", "webhook-due": "succeeded"}


@pytest.fixture
def older(database_url: str) -> tuple[str, str]:
    """The URL of the database, and its dump."""
    dump = databases.older(database_url)
    databases.run(database_url, dump)
    return database_url, dump


async def test_everything_is_there(older: tuple[str, str]) -> None:
    url, dump = older
    async with Predictions(url) as known:
        for api in ("cog", "replicate"):
            found = {name: await known.get(f"{api}-{name}") for name in UNFINISHED | ENDED}
            assert {name: prediction.status for name, prediction in found.items()} == UNFINISHED | ENDED
            for name, prediction in found.items():
                assert (prediction.owner, prediction.api, prediction.shown_input) == ("front-before", api, SHOWN)
                (kept,) = databases.rows(url, f"SELECT request FROM predictions WHERE id = '{prediction.id}'")[0]
                kept = json.loads(kept) if isinstance(kept, str) else kept
                assert kept == (SECRET if name in UNFINISHED else None)
                assert (prediction.deaths, prediction.adoptions) == (name == "processing", 0)
                asked = (prediction.model, prediction.version, prediction.base_url)
                expected = ("someone/some-model", "0" * 64, "http://127.0.0.1:8000")
                assert asked == (expected if api == "replicate" else ("", "", ""))
                assert bool(prediction.completed_at) == prediction.finished == (name in ENDED)
            running, drawn, due = (found[name] for name in ("processing", "succeeded", "webhook-due"))
            assert (running.logs, running.metrics, running.deaths) == (
                "Using seed: 7\n 50%|#####     | 2/4",
                {"seed": 7},
                1,
            )
            assert running.created_at < running.started_at
            assert [name for name in found if found[name].cancel_requested] == ["unwanted", "canceled"]
            assert found["failed"].error == "A mask needs an image."
            assert drawn.metrics == {"predict_time": 1.5, "timing": {"denoise": 1.2}}
            (output,) = drawn.output
            file = await known.file(output.split("/")[2])
            assert output == f"/files/{file.id}/output.webp"
            assert (file.content_type, file.size, file.about) == ("image/webp", 7, None)
            assert drawn.webhook_events == ["start", "output", "logs", "completed"]
            assert (due.webhook, due.webhook_events) == ("http://127.0.0.1:9/hook", ["completed"])
            assert [name for name in found if found[name].webhook_due] == ["webhook-due"]
        (upload,) = await known.uploads()
        assert (upload.name, upload.about) == ("photo.png", {"metadata": {"of": "a fox"}})
        assert f"'{await known.secret('webhooks')}'" in dump
        assert (await known.beat("front-now"))[0] == {"front-before": 1, "front-now": 0}


async def test_what_was_unfinished_is_adopted_and_ends(older: tuple[str, str]) -> None:
    url, _ = older
    async with Predictions(url) as known:
        await known.beat("front-now")
        adopted = await known.adopt("front-now", ["front-before"], [], 100)
        left = [*UNFINISHED, "webhook-due"]
        assert sorted(orphan.id for orphan in adopted) == sorted(f"{a}-{n}" for a in ("cog", "replicate") for n in left)
        for orphan in adopted:
            if orphan.finished:
                await known.delivered(orphan)
            else:
                assert orphan.secret_input == SECRET
                assert await known.finish(orphan, [], status="succeeded", completed_at=now())
                found = databases.rows(url, f"SELECT request FROM predictions WHERE id = '{orphan.id}'")
                assert found == [(None,)]
            assert orphan.adoptions == 1
        assert await known.adopt("front-later", ["front-now"], [], 100) == []


async def test_pages_list_what_replicates_clients_made(older: tuple[str, str]) -> None:
    async with Predictions(older[0]) as known:
        page = await known.page(size=3)
        seen = list(page.predictions)
        while page.next:
            page = await known.page(page.next, size=3)
            seen += page.predictions
        assert [prediction.id for prediction in seen] == [f"replicate-{name}" for name in reversed(UNFINISHED | ENDED)]

"""Webhooks: a coglet's, in a coglet's order."""

import json
import time
from typing import Any

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from harness.cluster import Cluster, Hooks, Server
from tests.cluster.small_cluster import comparable


@pytest.mark.parametrize(
    ("inputs", "events"),
    [
        ({"prompt": "slow", "steps": 3}, None),
        ({"prompt": "slow", "steps": 3}, ["start", "completed"]),
        ({"prompt": "a"}, ["output"]),
        ({"prompt": "fail"}, ["completed"]),
        ({"prompt": "a"}, []),
    ],
)
def test_webhooks_are_coglets(
    inputs: dict[str, Any], events: list[str] | None, coglet: Server, cluster: Cluster
) -> None:
    name = f"hooked-{len(inputs)}-{inputs['prompt']}-{'-'.join(events if events is not None else ['all'])}"
    said = []
    for server in (coglet, cluster):
        with Hooks() as hooks:
            fields = {} if events is None else {"webhook_events_filter": events}
            server.predict(inputs, name, webhook=hooks.url, **fields)
            if events is None or "completed" in events:
                hooks.until_ended(name)
            elif events:
                hooks.until(lambda body: "output" in body)
            else:
                time.sleep(1)
            bodies = sorted({json.dumps(body, sort_keys=True) for _, body in hooks.received}, key=len)
            said.append([comparable((200, {}, body.replace(": ", ":")))[-1] for body in bodies])
    expected, seen = said
    if events is None:  # how often the log is told depends on the clock
        expected, seen = ([said[0], said[-1]] for said in (expected, seen))
    assert seen == expected


def test_an_output_is_told_before_the_end(cluster: Cluster) -> None:
    names = [f"drawn-{i}" for i in range(30)]  # of coglet's webhooks one in five comes after the end's
    with Hooks() as hooks:
        for name in names:
            events = {"webhook_events_filter": ["output", "completed"]}
            cluster.predict({"prompt": "a", "steps": 1}, name, webhook=hooks.url, **events)
        for name in names:
            told, end = hooks.until_ended(name)
            assert (told["status"], end["status"], told["output"]) == ("processing", "succeeded", end["output"])


def test_the_end_is_the_last_that_a_slow_listener_hears(cluster: Cluster) -> None:
    with Hooks(seconds=0.5) as hooks:
        cluster.predict({"prompt": "a"}, "told-slowly", webhook=hooks.url)
        said = hooks.until_ended("told-slowly")
        time.sleep(1)
        assert len(hooks.received) == len(said) > 1
    assert [body["status"] for body in said] == ["processing"] * (len(said) - 1) + ["succeeded"]

"""A front's metrics for Prometheus, through Ray; `cluster/deploy/grafana.json` draws them."""

from datetime import datetime
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.predictions import Prediction

SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]


class Metrics:
    """A front's counters."""

    def __init__(self) -> None:
        self.unfinished = Gauge("flux_unfinished", "Predictions that this front has accepted and not ended.")
        self.ended = Counter("flux_predictions", "Predictions that have ended.", ("status",))
        self.latency = Histogram("flux_seconds", "Where the time goes.", boundaries=SECONDS, tag_keys=("phase",))
        self.images = Counter("flux_images", "Pictures drawn.")
        self.dropped = Counter("flux_safety_dropped", "Pictures that the safety check kept back.")
        self.retries = Counter("flux_retries", "Attempts that came to nothing, most often with their worker.")
        self.adopted = Counter("flux_adopted", "Predictions taken over from a front that had ended.")
        self.answers = Counter("flux_http_answers", "Requests that this front has answered.", ("status_code",))

    def count(self, prediction: Prediction) -> None:
        """Record a prediction that has ended."""
        self.ended.inc(tags={"status": prediction.status})
        created, started, completed = (
            datetime.fromisoformat(time) if time else None
            for time in (prediction.created_at, prediction.started_at, prediction.completed_at)
        )
        self.latency.observe((completed - created).total_seconds(), {"phase": "total"})
        if started:
            self.latency.observe((started - created).total_seconds(), {"phase": "queue"})
        timings = {"predict": prediction.metrics.get("predict_time"), **_group(prediction, "timing")}
        for phase, seconds in timings.items():
            if isinstance(seconds, int | float):
                self.latency.observe(seconds, {"phase": phase})
        if isinstance(prediction.output, list) and prediction.output:
            self.images.inc(len(prediction.output))
        dropped = _group(prediction, "safety").get("dropped")
        if isinstance(dropped, list) and dropped:
            self.dropped.inc(len(dropped))


def _group(prediction: Prediction, name: str) -> dict[str, Any]:
    group = prediction.metrics.get(name)
    return group if isinstance(group, dict) else {}


class Counted:
    """Counts the answers of an application."""

    def __init__(self, app: ASGIApp, answers: Counter) -> None:
        self.app, self.answers = app, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers.inc(tags={"status_code": str(message["status"])})
            await send(message)

        await self.app(scope, receive, counting)

"""What Prometheus hears."""

import re
import time

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import httpx

from harness.cluster import Cluster
from settings import ROOT


def test_prometheus_hears_what_the_dashboard_draws(cluster: Cluster) -> None:
    dashboard = (ROOT / "cluster" / "deploy" / "grafana.json").read_text()
    drawn = set(re.findall(r"ray_(flux_\w+?)(?:_bucket|_sum|_count|_total)?\b", dashboard))
    give_up = time.monotonic() + 30
    told: set[str] = set()
    # These have not happened on every node that tells; a kept-back picture never does here.
    while missing := drawn - told - {"flux_safety_dropped", "flux_retries", "flux_adopted"}:
        assert time.monotonic() < give_up, f"Prometheus was not told of {missing}"
        # Each worker's first one is a load, its second a hit.
        cluster.request("POST", "/predictions", {"input": {"prompt": "a", "replicate_weights": "owner/name"}})
        time.sleep(0.5)
        told = set(
            re.findall(r"^ray_(flux_\w+?)(?:_bucket|_sum|_count|_total)?\{", httpx.get(cluster.metrics_url).text, re.M)
        )

"""A short version of `script/bench fuzz --cluster`: the whole of it is for an evening."""

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from harness.cluster_fuzz import target
from harness.hostile_kinds import KINDS


def test_a_short_attack_of_every_kind_breaks_nothing(tmp_path: Path) -> None:
    with target(tmp_path) as attacked:
        report = attacked.run(300, seed=1, seconds=40)
    assert report.failures == {}
    assert set(report.requests) == set(KINDS)
    # Honest clients were served all the time.
    assert min(report.honest[work] for work in ("cog", "replicate", "look", "health checks")) > 10

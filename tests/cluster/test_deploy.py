"""The files by which it runs elsewhere."""

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

import yaml

from cluster.local import RAY
from cluster.settings import ClusterSettings
from settings import ROOT


def test_the_image_has_the_settings_of_the_local_cluster() -> None:
    dockerfile = (ROOT / "cluster" / "deploy" / "Dockerfile").read_text()
    assert {name: dockerfile.partition(f"{name}=")[2].split()[0] for name in RAY} == RAY


def test_the_manifests_hold_the_same_configuration() -> None:
    configuration = yaml.safe_load((ROOT / "cluster" / "deploy" / "serve.yaml").read_text())
    service, address, _ = yaml.safe_load_all((ROOT / "cluster" / "deploy" / "rayservice.yaml").read_text())
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == configuration
    (application,) = configuration["applications"]
    settings = ClusterSettings.from_environment(application["runtime_env"]["env_vars"])
    assert settings.public_url or settings.trusted_proxies
    deployments = {each["name"]: each for each in application["deployments"]}
    assert deployments["CogWorker"]["max_ongoing_requests"] == 1
    nodes = service["spec"]["rayClusterConfig"]
    assert f"ray[serve]=={nodes['rayVersion']}\n" in (ROOT / "cluster" / "requirements.txt").read_text()
    workers, fronts = (group["template"] for group in nodes["workerGroupSpecs"])
    assert address["spec"]["selector"] == fronts["metadata"]["labels"]
    pod = workers["spec"]
    patience = [deployments[name]["graceful_shutdown_timeout_s"] for name in ("CogWorker", "Front")]
    assert patience[0] < patience[1] < pod["terminationGracePeriodSeconds"]

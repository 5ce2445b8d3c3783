"""In a cluster, the predictor's process gets the environment without the cluster's own secrets."""

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from cluster.withheld import withheld
from harness.cluster import Cluster
from local_cog.server import CogServer
from tests.cluster.small_cluster import TOKEN

PREDICTOR = """
import os

from cog import BasePredictor


class Predictor(BasePredictor):
    def setup(self) -> None:
        pass

    def predict(self) -> str:
        return "\\n".join(f"{name}={value}" for name, value in sorted(os.environ.items()))
"""
SECRETS = """API_TOKENS DATABASE_URL FILES_URL PGPASSWORD PGPASSFILE PGSERVICEFILE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH
RAY_REDIS_PASSWORD RAY_REDIS_ADDRESS REDIS_PASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
AWS_WEB_IDENTITY_TOKEN_FILE AWS_SHARED_CREDENTIALS_FILE GOOGLE_APPLICATION_CREDENTIALS AZURE_STORAGE_CONNECTION_STRING
AZURE_STORAGE_ACCOUNT_KEY AZURE_CLIENT_SECRET FSSPEC_S3_SECRET POSTGRES_PASSWORD POSTGRES_PASSWORD_FILE
IDENTITY_HEADER MSI_SECRET"""
NEEDED = """HTTPS_PROXY HTTP_PROXY ALL_PROXY https_proxy SSL_CERT_FILE SSL_CERT_DIR CUDA_VISIBLE_DEVICES
NVIDIA_VISIBLE_DEVICES HF_TOKEN HF_ENDPOINT HF_HOME HF_HUB_OFFLINE CIVITAI_API_TOKEN REPLICATE_API_TOKEN OMP_NUM_THREADS
WEIGHTS_CACHE PREDICTION_SECONDS FLUX_DEV COG_WEIGHTS TORCHINDUCTOR_CACHE_DIR PYTORCH_CUDA_ALLOC_CONF RAY_JOB_ID
PGHOST PUBLIC_URL REQUESTS_CA_BUNDLE"""


def test_a_cog_server_leaves_out_the_cluster_s_secrets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "predict.py").write_text(PREDICTOR)
    secrets, needed = set(SECRETS.split()), {name: f"/needed/{name}" for name in NEEDED.split()}
    for name in secrets:
        monkeypatch.setenv(name, "/T0PSECRET")
    needed["OMP_NUM_THREADS"] = "1"
    for name, value in needed.items():
        monkeypatch.setenv(name, value)
    given = dict.fromkeys(withheld([*secrets, *needed]))
    with CogServer(tmp_path, environment=given, log=tmp_path / "log") as server:
        server.wait_until_ready()
        told = dict(line.partition("=")[::2] for line in server.predict({})["output"].splitlines())
    assert not secrets & told.keys()
    assert "T0PSECRET" not in "".join(told.values())
    assert {name: told.get(name) for name in needed} == needed


def test_the_cluster_s_cog_servers_have_none_of_its_secrets(cluster: Cluster) -> None:
    servers = cluster.wait_for("cog.server.http")
    assert servers
    for process in servers:
        told = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        names = {entry.partition(b"=")[0].decode() for entry in told}
        assert not withheld(names)
        assert {"PATH", "PORT", "HTTP_PROXY", "RAY_AUTH_MODE"} <= names
        assert not any(TOKEN.encode() in entry for entry in told)

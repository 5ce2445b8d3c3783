import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.cluster import Cluster, Server
from harness.postgres import Postgres, find_programs
from harness.waiting import wait_until
from local_cog.server import LOOPBACK, CogServer, free_port
from tests.cluster.databases import run
from tests.cluster.small_cluster import PREDICTOR, QUEUE, TOKEN, WORKERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster's tests come last, since it runs until the session ends; those that kill parts of it end them."""
    here, killers = Path(__file__).parent, ("test_dispatcher", "test_metrics")
    items.sort(key=lambda item: (here in item.path.parents, item.path.stem in killers))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    (directory / "predict.py").write_text(PREDICTOR)
    return directory


@pytest.fixture(scope="session")
def cog_server(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    with CogServer(project, log=tmp_path_factory.mktemp("coglet") / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def coglet(cog_server: CogServer) -> Server:
    """One Cog server, as it is, ready for a prediction."""
    wait_until(lambda: cog_server.health()["status"] == "READY", 60)
    return Server(cog_server.port)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with Postgres(programs) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'predictions.db'}"
    url = request.getfixturevalue("postgres").url
    run(url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return url


async def leave_predictions(database: str) -> None:
    """What a front leaves that dies with all others: one that waits, one that runs, one that was to be cancelled.

    Older than these are more than a front adopts at a beat that can neither be run nor be told of.
    """
    from cluster.predictions import Prediction, Predictions, now  # here: they need cluster/requirements.txt

    async with Predictions(database) as known:
        await known.beat("dead")
        for i in range(25):
            hook = {"webhook": "http://a..b/?token=s3cret", "webhook_events": ["start", "completed"]}
            await known.create(Prediction(f"poison-{i}", "dead", now(), None, {}, "cog", **hook))
        for name in ("waiting", "running", "unwanted"):
            inputs = {"prompt": name}
            made = Prediction(f"left-{name}", "dead", now(), secret_input=inputs, shown_input=inputs, api="cog")
            await known.create(made)
        await known.record(Prediction("left-running", "dead", now(), {}, {}, "cog"), status="processing", logs="a half")
        await known.cancel("left-unwanted")


@pytest.fixture(scope="session")
def cluster(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Workers and two fronts on two nodes, over SQLite; a cluster that died has left predictions there."""
    data = tmp_path_factory.mktemp("cluster")
    asyncio.run(leave_predictions(f"sqlite:///{data / 'predictions.db'}"))
    environment = {
        "DATABASE_URL": f"sqlite:///{data / 'predictions.db'}",
        "FILES_URL": str(data / "files"),
        "API_TOKENS": f"another,{TOKEN}",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Nothing is there: what goes on within the machine must not go through an operator's proxy.
        "HTTP_PROXY": f"http://{LOOPBACK}:{free_port()}",
    }
    options = ("--project", str(project), "--workers", str(WORKERS), "--nodes", "2", "--queue", str(QUEUE))
    with Cluster(*options, environment=environment, log=data / "log", token=TOKEN) as running:
        yield running

from collections.abc import Iterator

import pytest

from local_cog.server import CogServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """The project behind the real Cog server; what it prints is in `server.log`."""
    directory = tmp_path_factory.mktemp("server")
    environment = {"WEIGHTS_CACHE": str(directory / "weights"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1"}
    with CogServer(environment=environment, log=directory / "log") as running:
        running.wait_until_ready()
        yield running

from collections.abc import Iterator

import pytest
import torch

from cog_server import CogServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """The project behind the real Cog server; what it prints is in `server.log`."""
    directory = tmp_path_factory.mktemp("server")
    environment = {"WEIGHTS_CACHE": str(directory / "weights"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1"}
    with CogServer(environment=environment, log=directory / "log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread is waited for longer than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

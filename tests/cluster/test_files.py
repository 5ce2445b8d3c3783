"""Files of clients: kept, given in pieces, and refused where there is no room."""

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from starlette.applications import Starlette

from cluster.addresses import Addresses
from cluster.api_common import exception_handlers
from cluster.bodies import Bodies
from cluster.failures import Failure
from cluster.files import Files
from cluster.predictions import Predictions
from harness.cluster import Server
from settings import MIB
from tests.cluster.served import served

LARGE = b"a" * 8 * MIB
TOO_LARGE = 5 * LARGE


def test_a_file_is_given_in_pieces(tmp_path: Path) -> None:
    async def story() -> None:
        files = Files(str(tmp_path))
        file = await files.write(LARGE + b"b", "a.png", "image/png")
        size, pieces = await files.open(file.id)
        given = [piece async for piece in pieces]
        assert (size, b"".join(given)) == (len(LARGE) + 1, LARGE + b"b")
        assert len(given) == 9
        with pytest.raises(FileNotFoundError):
            await files.open(file.id[:-1])

    asyncio.run(story())


def test_a_file_without_room_leaves_nothing(small_disk: Path) -> None:
    async def story() -> None:
        files = Files(str(small_disk))
        with pytest.raises(Failure, match="store of files is full"):
            await files.write(TOO_LARGE, "a.png", "image/png")
        assert list(small_disk.rglob("*")) == []
        assert (await files.write(b"a", "a.png", "image/png")).size == 1

    asyncio.run(story())


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_an_upload_without_room_is_told_when_to_ask_again(small_disk: Path, tmp_path: Path) -> None:
    from cluster.replicate_api import ReplicateApi  # here, for Ray Serve warns when it is imported

    predictions, bodies = Predictions(f"sqlite:///{tmp_path / 'predictions.db'}"), Bodies(100 * MIB, lambda: 0)
    api = ReplicateApi(None, predictions, Files(str(small_disk)), None, None, bodies, Addresses(None, ()), "")
    form = b'--x\r\nContent-Disposition: form-data; name="content"; filename="a"\r\n\r\n%s\r\n--x--\r\n' % TOO_LARGE
    with served(Starlette(routes=api.routes(), exception_handlers=exception_handlers())) as port:
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        status, headers, text = Server(port).request("POST", "/v1/files", form, kind)
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(text)["detail"] == "The cluster's store of files is full; try again later."
    predictions.engine.dispose()

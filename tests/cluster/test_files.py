"""Files of clients: kept, given in pieces, and refused where there is no room."""

import asyncio
import base64
import json
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the cluster needs cluster/requirements.txt")

from starlette.applications import Starlette

from cluster.addresses import Addresses
from cluster.api_common import exception_handlers
from cluster.bodies import Bodies
from cluster.failures import Failure
from cluster.files import PIECE_BYTES, Files, names_files, read_pieces
from cluster.predictions import File, Predictions
from harness.cluster import Server
from service.data_uri import uri
from settings import MIB
from sources.choices import read_choices
from tests.cluster.served import served

LARGE = b"a" * 8 * MIB
TOO_LARGE = 5 * LARGE


async def test_a_file_is_given_in_pieces(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    file = await files.write(LARGE + b"b", "a.png", "image/png")
    size, opened = await files.open(file.id)
    given = [piece async for piece in read_pieces(opened, size)]
    assert opened.closed
    assert (size, b"".join(given)) == (len(LARGE) + 1, LARGE + b"b")
    assert all(len(piece) == PIECE_BYTES for piece in given[:-1])
    with pytest.raises(FileNotFoundError):
        await files.open(file.id[:-1])


async def test_an_output_has_its_files_inside_in_pieces(tmp_path: Path) -> None:
    """Also where other text looks like a file's path; a file that has gone is null."""
    files = Files(str(tmp_path))
    contents = [b"", b"a", LARGE + b"bc"]
    known = [await files.write(content, "output.webp", "image/webp") for content in contents]
    paths = [f"/files/{file.id}/output.webp" for file in known]
    gone = f"/files/{known[0].id[::-1]}/output.webp"
    path = paths[0]
    others = [f'a"{path}', f'{path}"', f"{path}\\", f"{path}/x", f"x{path}", "/files//output.webp", None, 1]
    output = {"paths": [*paths, gone], "others": others, path: "a name"}
    inlined = await files.inline_output(output)
    pieces = [piece async for piece in inlined.pieces()]
    inside = [f"data:image/webp;base64,{base64.b64encode(content).decode()}" for content in contents]
    assert json.loads(b"".join(pieces)) == output | {"paths": [*inside, None]}
    assert sum(map(len, pieces)) == inlined.length
    assert max(map(len, pieces)) == PIECE_BYTES // 3 * 4
    alone = await files.inline_output("a täxt")
    assert [piece async for piece in alone.pieces()] == ['"a täxt"'.encode()]
    await files.delete([known[1].id])
    with pytest.raises(FileNotFoundError):  # its length has been told
        [piece async for piece in inlined.pieces()]


async def test_uploads_that_are_too_large_together_are_not_read(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "files"))
    async with Predictions(f"sqlite:///{tmp_path / 'predictions.db'}") as predictions:
        file = await files.write(b"abc" * 1000, "a.png", "image/png", {})
        await predictions.add_file(file)
        inputs = {"image": f"http://front/v1/files/{file.id}", "mask": f"http://b/files/{file.id}/a.png", "n": 1}
        inlined = await files.inline_files(inputs, predictions, "", 8100)
        assert inlined == {**dict.fromkeys(("image", "mask"), uri(b"abc" * 1000, "image/png")), "n": 1}
        await files.delete([file.id])
        with pytest.raises(Failure, match=r"image has expired"):
            await files.inline_files(inputs, predictions, "http://front", 8100)
        with pytest.raises(Failure, match=r"too large together: 0 MiB of JSON; at most 0\."):
            await files.inline_files(inputs, predictions, "http://front", 7999)


async def test_a_file_may_be_a_term_of_a_sum_or_of_json(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "files"))
    async with Predictions(f"sqlite:///{tmp_path / 'predictions.db'}") as predictions:
        file = await files.write(b"a LoRA", "a.safetensors", "application/octet-stream", {})
        await predictions.add_file(file)
        url, inside = f"http://front/v1/files/{file.id}", uri(b"a LoRA", "application/octet-stream")
        escaped = json.dumps([{"path": url, "scale": 2}, {"path": "zorp"}]).replace("/", "\\/")
        inputs = {"prompt": "a cat + a fox", "replicate_weights": f"{url}*0.5 + zorp", "extra_lora": escaped}
        assert names_files(inputs)
        inlined = await files.inline_files(inputs, predictions, "http://front", 8100)
        assert (inlined["prompt"], inlined["replicate_weights"]) == ("a cat + a fox", f"{inside}*0.5 + zorp")
        for pasted in ("{}*0.5", " {}*-1 ", '"{}"*2'):
            inputs = {"replicate_weights": pasted.format(url)}
            assert names_files(inputs)
            sent = await files.inline_files(inputs, predictions, "http://front", 8100)
            assert [choice.reference.strip('"') for choice in read_choices(sent["replicate_weights"])] == [inside]
        for pasted in ('"{}"', "<{}>", "\ufeff{}"):
            inputs = {"image": pasted.format(url)}
            assert names_files(inputs)
            assert await files.inline_files(inputs, predictions, "http://front", 8100) == {"image": inside}
        assert json.loads(inlined["extra_lora"]) == [{"path": inside, "scale": 2}, {"path": "zorp", "scale": 1}]


def test_a_text_that_only_begins_like_a_file_stays_what_it_is(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    for text in ("data:;base64,!!!!", "data:;base64,a", "data:", "data:x", "data: a title, and more"):
        stored: dict[str, File] = {}
        output = asyncio.run(files.store_output([text], stored))
        assert (output, stored) == ([text], {})


async def test_a_file_without_room_leaves_nothing(small_disk: Path) -> None:
    files = Files(str(small_disk))
    with pytest.raises(Failure, match="store of files is full"):
        await files.write(TOO_LARGE, "a.png", "image/png")
    assert list(small_disk.rglob("*")) == []
    assert (await files.write(b"a", "a.png", "image/png")).size == 1


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_an_upload_without_room_is_told_when_to_ask_again(small_disk: Path, tmp_path: Path) -> None:
    from cluster.replicate_api import ReplicateApi  # here, for Ray Serve warns when it is imported

    predictions, bodies = Predictions(f"sqlite:///{tmp_path / 'predictions.db'}"), Bodies(100 * MIB, lambda: 0)
    addresses = Addresses(None, ())
    api = ReplicateApi(None, predictions, Files(str(small_disk)), None, None, None, bodies, False, addresses, "", None)
    form = b'--x\r\nContent-Disposition: form-data; name="content"; filename="a"\r\n\r\n%s\r\n--x--\r\n' % TOO_LARGE
    with served(Starlette(routes=api.routes(), exception_handlers=exception_handlers())) as port:
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        status, headers, text = Server(port).request("POST", "/v1/files", form, kind)
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(text)["detail"] == "The cluster's store of files is full; try again later."
    predictions.engine.dispose()

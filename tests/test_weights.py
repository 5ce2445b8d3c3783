"""LoRAs from anywhere, cached: real hosts on loopback, many processes, the operator's own paths, the real server."""

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import cog
import pytest

import images
from harness.hosts import File, Host, hugging_face, in_turn, redirect, silent, status
from harness.waiting import wait_until
from local_cog.server import CogServer, failure, files
from request import LoraChoice
from settings import MIB, ROOT, Settings
from sources.choices import read_own_choices
from tests.support.caches import SECRET
from tests.support.fetching import (
    LARGE,
    LORA,
    OTHER,
    OTHER_PEFT,
    PACKED,
    PEFT,
    fetch,
    fetch_config,
    make_lora,
    make_tar,
    refusal,
    start,
)
from tests.support.lora_files import lora_of_the_miniature
from weights import WeightsCache, fetch_pictures, parse_picture

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


def test_what_has_not_changed_is_not_sent_again(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LORA)
    for _ in range(3):
        assert fetch(environment, host.url("/a")) == LORA
    assert file.sent == len(LORA)
    assert [request.headers.get("If-None-Match") for request in host.seen] == [None, '"1"', '"1"']


@pytest.mark.parametrize("name", ["my lora.safetensors", "a \"b\" <c> 'd' `e`", "цапля\u3000[1] 100%|a^b", "{x}"])
def test_a_name_with_spaces_and_quotes_is_asked_for_as_it_is(environment: Settings, host: Host, name: str) -> None:
    host.routes[f"/in it/{name}"] = redirect("/b c")
    host.routes["/b c"] = File(LORA)
    for reference in (host.url(f"/in it/{name}?a=b c"), f"<HTTP{host.url(f'/in it/{name}?a=b c')[4:]}>"):
        assert fetch(environment, reference) == LORA
    assert [request.query for request in host.seen] == [{"a": "b c"}, {}] * 2


def test_what_follows_a_number_sign_is_left_out_with_a_word(
    environment: Settings, host: Host, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    host.routes |= {"/lora": File(LORA), "/lora#1": File(OTHER)}
    assert fetch(environment, host.url(f"/lora?a={SECRET}#{SECRET}")) == LORA
    fetch_pictures({"image": parse_picture("image", host.url(f"/lora#{SECRET}"))}, tmp_path / "request", environment)
    told = "what follows the # was left out; a # in the name of a file must be written %23."
    assert capfd.readouterr().out.splitlines() == [f"{host.url('/lora')}: {told}", f"image {host.url('/lora')}: {told}"]
    assert fetch(environment, host.url("/lora%231")) == OTHER
    assert capfd.readouterr().out == ""


def test_what_has_changed_is_fetched(environment: Settings, host: Host) -> None:
    for number, content in enumerate((LORA, OTHER, LORA)):
        host.routes["/a"] = File(content, etag=f'"{number}"')
        assert fetch(environment, host.url("/a")) == content


def test_a_host_that_ignores_conditions_is_left_as_soon_as_its_etag_is_known(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, conditional=False, ranges="none", delay=0.002)
    fetch(environment, host.url("/a"))
    sent = file.sent
    assert fetch(environment, host.url("/a")) == LARGE
    assert file.sent < sent + 8 * MIB


def test_without_an_etag_nothing_old_is_served(environment: Settings, host: Host) -> None:
    host.routes["/a"] = in_turn(File(LORA, etag=None), File(OTHER, etag=None))
    assert fetch(environment, host.url("/a")) == LORA
    assert fetch(environment, host.url("/a")) == OTHER


@pytest.mark.parametrize("trouble", ["down", "500", "429", "silent", "breaks off"])
def test_when_the_host_is_down_the_cached_file_serves_and_the_log_says_so(
    environment: Settings, host: Host, capfd: pytest.CaptureFixture, trouble: str
) -> None:
    host.routes["/a"] = File(LORA)
    url = host.url(f"/a?token={SECRET}")
    fetch(environment, url)
    if trouble == "down":
        host.stop()
    troubles = {
        "500": status(500),
        "429": status(429),
        "silent": silent,
        "breaks off": File(OTHER, etag='"2"', ranges="none", breaks=99, breaks_after=5_000),
    }
    host.routes["/a"] = troubles.get(trouble, silent)
    assert fetch(environment, url) == LORA
    assert "The cached file is used." in capfd.readouterr().out


def test_when_hugging_face_is_down_the_cached_file_serves(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    fetch(places, "huggingface.co/o/r")
    host.routes.clear()
    host.routes["/api/models/o/r/revision/main"] = status(503)
    assert fetch(places, "huggingface.co/o/r") == LORA
    assert len(host.asked("/api/models/o/r/revision/main")) == 2


def test_what_was_withdrawn_is_not_served(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA)
    fetch(environment, host.url("/a"))
    host.routes["/a"] = status(404)
    assert "answered 404" in refusal(environment, host.url("/a"))


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[]", b'{"sha256": 3}', b'{"unknown": 1}', b"\xff"])
def test_a_record_that_cannot_be_read_is_forgotten(environment: Settings, host: Host, damage: bytes) -> None:
    host.routes["/a"] = File(LORA)
    fetch(environment, host.url("/a"))
    for record in environment.cache_dir.glob("references/*"):
        record.write_bytes(damage)
    assert fetch(environment, host.url("/a")) == LORA


@pytest.mark.parametrize("reference", ["main", "c" * 40, "url"])
def test_a_record_from_before_configs_were_kept_is_made_anew(
    places: Settings, host: Host, storage: Host, reference: str
) -> None:
    hugging_face(host, storage, "o/r", {"adapter_model.safetensors": LORA, "adapter_config.json": PEFT})
    storage.routes["/a"] = File(make_tar({"a.safetensors": LORA, "adapter_config.json": PEFT}))
    name = storage.url("/a") if reference == "url" else f"https://huggingface.co/o/r/tree/{reference}"
    fetch(places, name)
    (record,) = places.cache_dir.glob("references/*")
    kept = json.loads(record.read_text())
    del kept["config"]
    kept["key"] = kept["key"] and kept["key"].partition(" o/r/adapter_config.json")[0]
    record.write_text(json.dumps(kept))
    host.seen.clear()
    for _ in range(2):
        assert fetch_config(places, name) == PEFT
    assert len([request for request in host.seen if request.path.endswith(".safetensors")]) == 0
    assert len(storage.asked("/a")) == (3 if reference == "url" else 0)


def test_a_file_that_was_deleted_is_fetched_again(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA)
    fetch(environment, host.url("/a"))
    for file in environment.cache_dir.glob("loras/*"):
        file.unlink()
    assert fetch(environment, host.url("/a")) == LORA


def test_many_processes_download_once(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, ranges="none", etag=None, delay=0.001)
    processes = [start(environment, host.url("/a")) for _ in range(8)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len([request for request in host.seen if "Range" not in request.headers]) == 1
    assert file.sent < len(LARGE) + 8 * MIB


def test_one_that_dies_while_others_wait_is_replaced(environment: Settings, host: Host) -> None:
    file = host.routes["/a"] = File(LARGE, delay=0.01, ranges="none")
    first = start(environment, host.url("/a"))
    wait_until(lambda: file.sent > MIB)
    others = [start(environment, host.url("/a")) for _ in range(3)]
    time.sleep(0.1)
    first.kill()
    first.join()
    file.delay = 0
    for process in others:
        process.join(10)
        assert process.exitcode == 0


@pytest.mark.parametrize("form", PACKED)
def test_the_operators_file_may_lie_on_the_disk(environment: Settings, tmp_path: Path, form: str) -> None:
    file = tmp_path / "mine"
    file.write_bytes(PACKED[form])
    for reference in (str(file), f"file://{file}"):
        for _ in range(2):
            with WeightsCache(environment).open_local(reference) as weights:
                assert weights.path.read_bytes() == LORA
                assert weights.name == "mine"
                assert (weights.path == file) == (form == "raw")
    file = file.rename(tmp_path / "mine\n100%")
    file.write_bytes(OTHER)
    with WeightsCache(environment).open_local(str(file)) as weights:
        assert weights.name == "mine?100%"
        assert weights.path.read_bytes() == OTHER


def test_the_operators_archive_is_read_once(environment: Settings, tmp_path: Path) -> None:
    archive = tmp_path / "trained.tar"
    archive.write_bytes(make_tar({"lora.safetensors": make_lora(16 * MIB)}))
    for most in (math.inf, 8 * MIB):
        before = read_bytes()
        with WeightsCache(environment).open_local(str(archive)):
            assert read_bytes() - before < most


def read_bytes() -> int:
    """How much this process has read from files, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_the_operators_folder(environment: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "trained" / "output"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="no regular"):
        WeightsCache(environment).open_local(str(tmp_path / "trained")).__enter__()
    (folder / "lora.safetensors").write_bytes(LORA)
    (folder / "optimizer.safetensors").write_bytes(OTHER)
    with WeightsCache(environment).open_local(str(tmp_path / "trained")) as weights:
        assert weights.path == folder / "lora.safetensors"


@pytest.mark.parametrize("of", ["folder", "file"])
def test_the_config_beside_the_operators_file_is_read_at_each_request(
    environment: Settings, tmp_path: Path, of: str
) -> None:
    file = tmp_path / "trained" / "output" / "adapter_model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(LORA)
    (tmp_path / "trained" / "adapter_config.json").write_bytes(b"in another folder")
    reference = str(file if of == "file" else tmp_path / "trained")
    assert fetch_config(environment, reference, trusted=True) == b""
    for config in (PEFT, OTHER_PEFT, b""):
        (file.parent / "adapter_config.json").write_bytes(config)
        assert fetch_config(environment, reference, trusted=True) == config
    (file.parent / "adapter_config.json").write_bytes(bytes(MIB // 4 + 1))
    with pytest.raises(ValueError, match=r"^adapter_config.json has more than 0.25 MB, which no config of a LoRA"):
        fetch_config(environment, reference, trusted=True)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_regular_file_is_no_config(environment: Settings, tmp_path: Path, make: Callable) -> None:
    (tmp_path / "a.safetensors").write_bytes(LORA)
    make(tmp_path / "adapter_config.json")
    assert fetch_config(environment, str(tmp_path), trusted=True) == b""


def test_a_config_is_that_of_peft_s_own_file_where_there_is_one(environment: Settings, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(LORA)
    (tmp_path / "adapter_config.json").write_bytes(PEFT)
    assert fetch_config(environment, str(tmp_path), trusted=True) == PEFT
    (tmp_path / "adapter_model.safetensors").write_bytes(LORA)
    assert fetch_config(environment, str(tmp_path), trusted=True) == b""
    assert fetch_config(environment, str(tmp_path / "adapter_model.safetensors"), trusted=True) == PEFT


def test_the_operators_reference(environment: Settings, host: Host) -> None:
    host.routes["/a"] = File(LORA)
    with WeightsCache(environment).open_local(host.url("/a")) as weights:
        assert weights.path.read_bytes() == LORA
    with pytest.raises(ValueError, match="There is no file or folder 'all' at the path that was given"):
        WeightsCache(environment).open_local("/nowhere/at/all").__enter__()
    with pytest.raises(ValueError, match="There is no file or folder '~no-such-user/a'; as a reference"):
        WeightsCache(environment).open_local("~no-such-user/a").__enter__()
    with pytest.raises(ValueError, match=r"There is no file or folder 'http://\*\*\*@h'; as a reference") as refused:
        WeightsCache(environment).open_local(f"http://u:ab/{SECRET}@h").__enter__()
    assert SECRET not in str(refused.value)
    assert read_own_choices("~no-such-user/a") == [LoraChoice("~no-such-user/a", 1, trusted=True)]


def test_the_operator_s_pipe_is_not_waited_for(environment: Settings, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^pipe is no regular file\.$"):
        WeightsCache(environment).open_local(str(tmp_path / "pipe")).__enter__()


SMALL = {"prompt": "a red fox", "megapixels": "0.25", "num_inference_steps": 1, "disable_safety_checker": True}


def test_a_prediction_cancelled_while_its_lora_comes_frees_the_server_at_once(server: CogServer, host: Host) -> None:
    lora = lora_of_the_miniature(seed=1)
    file = host.routes["/a"] = File(lora, delay=0.3, slice=256)  # more than 7 seconds
    inputs = SMALL | {"replicate_weights": host.url(f"/a?token={SECRET}")}
    server.start(inputs, "cancelled-download")
    wait_until(lambda: file.sent > 0)
    assert server.cancel("cancelled-download") == 200
    began = time.monotonic()
    wait_until(lambda: server.health()["status"] == "READY")
    assert time.monotonic() - began < 3
    sent = file.sent
    time.sleep(1.5)
    assert file.sent <= sent + 2 * file.slice
    file.delay = 0
    answer = server.predict(inputs)
    assert failure(answer) is None
    assert f"LoRA {host.url('/a')} at 1" in answer["logs"]
    assert SECRET not in str(answer)


def test_what_a_download_says_is_in_the_log_of_its_prediction(server: CogServer, host: Host) -> None:
    host.routes["/a"] = File(make_tar({"x/lora.safetensors": lora_of_the_miniature(seed=2)}))
    answer = server.predict(SMALL | {"extra_lora": host.url("/a")})
    assert "x/lora.safetensors of the archive" in answer["logs"]
    host.stop()
    assert "The cached file is used." in server.predict(SMALL | {"extra_lora": host.url("/a")})["logs"]


def test_the_same_weights_under_another_config_draw_another_picture(server: CogServer, host: Host) -> None:
    answers = []
    for place, alpha in enumerate((4, 16, 4, 5)):
        config = {"peft_type": "LORA", "r": 5 if alpha == 5 else 4, "lora_alpha": alpha}
        members = {"a/adapter_model.safetensors": lora_of_the_miniature(seed=3)}
        packed = make_tar(members | {"a/adapter_config.json": json.dumps(config).encode()})
        host.routes["/a"] = File(packed, etag=f'"{place}"')
        answers.append(server.predict(SMALL | {"seed": 1, "extra_lora": host.url("/a")}))
    usual, strong, again, unfit = answers
    assert usual["output"] == again["output"] != strong["output"]
    assert "; its adapter_config.json counts." in strong["logs"]
    # At strength 1, as without one.
    assert unfit["output"] == usual["output"]
    unlike = "'single_transformer_blocks.0.attn.to_k', whose factors have 4."
    assert f"left aside: it says rank 5 for {unlike}" in unfit["logs"]


@pytest.mark.parametrize(
    "reference",
    [
        "http://u:ab/{0}@{1}/a",
        " http://u:{0}@{1}/missing?token={0}#{0}",
        "HTTP:/\\u:{0}@{1}/a",
        "u:p\\{0}@{1}/a",
        "\nhttp://{1}/private?{0}",
        "http://{1}/moved?{0}",
        "http://{1}/a;jsessionid={0}?{0}",
        "civitai.com?token={0}",
        "\ufeffdata:,{0}",
        " Data: x;base64,{0}",
    ],
)
def test_nothing_that_a_prediction_tells_has_a_reference_s_secret(
    server: CogServer, host: Host, reference: str, tmp_path: Path
) -> None:
    place, lora = host.address.removeprefix("http://"), File(lora_of_the_miniature(seed=4))
    moved = redirect(f"http://u:{SECRET}@{place}/there?signature={SECRET}")
    host.routes |= {"/a": lora, f"/a;jsessionid={SECRET}": lora, "/there": lora, "/moved": moved}
    host.routes["/private"] = status(401)
    for name in ("replicate_weights", "image"):
        answer = server.predict(SMALL | {"output_format": "png", name: reference.format(SECRET, place)})
        output = answer.pop("output", None) or []
        assert SECRET not in json.dumps(answer)
        for _, content in files({"output": output}):
            (tmp_path / "drawn.png").write_bytes(content)
            assert host.address in str(images.read_metadata(tmp_path / "drawn.png"))
            assert SECRET.encode() not in content
    assert SECRET not in server.log.read_text()


def test_no_error_calls_a_host_what_may_be_a_user(environment: Settings) -> None:
    said = refusal(environment, f"http://{SECRET}:12/x@huggingface.co/a")
    assert said.startswith("http://***@huggingface.co/a cannot be fetched: there is no host ***")
    assert SECRET not in said


def test_cog_is_the_one_whose_download_is_switched_off() -> None:
    """`predict.py` does it by a name inside of Cog: a new version has to be looked at first."""
    assert re.search(r'sdk_version: "(.*)"', (ROOT / "cog.yaml").read_text())[1] == cog.__version__ == "0.23.1"


def test_cog_neither_fetches_nor_opens_images_and_masks(server: CogServer, host: Host) -> None:
    host.routes |= {"/photo.png": redirect("/inside?signature=shown"), "/inside": status(404)}
    inputs = {"image": "data:image/png;base64,AAEC", "mask": host.url(f"/photo.png?token={SECRET}")}
    assert failure(server.predict(SMALL | inputs)) == (
        f"mask {host.url('/photo.png')} cannot be fetched: 127.0.0.1 answered 404 Not Found; there is no such file."
    )
    assert [request.headers["User-Agent"] for request in host.seen] == ["flux-sprites"] * 2
    host.seen.clear()
    for text in (f"file://{ROOT}/README.md", str(ROOT / "README.md"), "http://[", "data:"):
        said = failure(server.predict(SMALL | inputs | {"image": text}))
        assert said.startswith(("image is ", "The data: URI of image has "))
    # A mask without an image, or a LoRA that is none, is refused before anything is fetched.
    for wrong in ({"image": ""}, {"image": host.url("/photo.png"), "extra_lora": "none"}):
        assert failure(server.predict(SMALL | inputs | wrong))
    assert host.seen == []
    assert list(Path(server.scratch.name).glob("tmp*")) == []


def test_a_prediction_cancelled_while_its_image_comes_frees_the_server_at_once(server: CogServer, host: Host) -> None:
    file = host.routes["/a"] = File(bytes(100), delay=0.1, slice=1)
    server.start(SMALL | {"image": host.url("/a")}, "cancelled-image")
    wait_until(lambda: file.sent > 0)
    assert server.cancel("cancelled-image") == 200
    wait_until(lambda: server.health()["status"] == "READY")
    assert file.sent < 50


def test_references_that_are_shown_alike_are_not_taken_for_each_other(
    places: Settings, host: Host, storage: Host
) -> None:
    hugging_face(host, storage, "o/r", {"x;one.safetensors": LORA, "x;two.safetensors": OTHER})
    address = f"https://huggingface.co/o/r/resolve/{'c' * 40}/x;"
    assert fetch(places, f"{address}one.safetensors") == LORA
    assert fetch(places, f"{address}two.safetensors") == OTHER

"""Replicate, Hugging Face and CivitAI, played on loopback: which file they mean, and what they refuse."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from harness.hosts import (
    Answer,
    File,
    Host,
    civitai,
    hugging_face,
    in_json,
    in_turn,
    page,
    redirect,
    replicate,
    silent,
    status,
    trickle,
)
from settings import MIB, Settings
from tests.support.caches import SECRET
from tests.support.fetching import (
    LORA,
    OTHER,
    OTHER_PEFT,
    PACKED,
    PEFT,
    QUICK,
    VERSION,
    fetch,
    fetch_config,
    make_lora,
    make_tar,
    make_zip,
    nested,
    refusal,
)
from weights import WeightsCache


def test_replicate_gives_its_newest_weights_until_there_are_newer(places: Settings, host: Host, storage: Host) -> None:
    replicate(host, storage, "owner/name", PACKED["tar"])
    assert fetch(places, "owner/name") == LORA
    assert fetch(places, "https://replicate.com/owner/name") == LORA
    replicate(host, storage, "owner/name", make_tar({"a/lora.safetensors": OTHER}), etag='"2"')
    assert fetch(places, "owner/name") == OTHER


def test_a_version_of_replicate_is_looked_up_once(places: Settings, host: Host, storage: Host) -> None:
    file = replicate(host, storage, "owner/name", PACKED["tar"], version=VERSION)
    for reference in (f"owner/name/{VERSION}", f"owner/name:{VERSION}", f"https://replicate.com/owner/name/{VERSION}"):
        assert fetch(places, reference) == LORA
    assert len(host.seen) == 1
    assert file.sent == len(PACKED["tar"])


def test_what_replicate_moves_elsewhere_is_fetched_anew_though_its_etag_is_the_same(
    places: Settings, host: Host, storage: Host
) -> None:
    storage.routes |= {"/1": File(PACKED["tar"]), "/2": File(nested(OTHER))}
    host.routes["/owner/name/_weights"] = in_turn(redirect(storage.url("/1")), redirect(storage.url("/2")))
    assert fetch(places, "owner/name") == LORA
    assert fetch(places, "owner/name") == OTHER


def test_private_models_of_replicate(places: Settings, host: Host, storage: Host) -> None:
    replicate(host, storage, "owner/name", PACKED["tar"], token=SECRET)
    assert "REPLICATE_API_TOKEN" in (said := refusal(places, "owner/name"))
    assert "huggingface.co/owner/name" in said
    assert fetch(replace(places, replicate_token=SECRET), "owner/name") == LORA
    assert all("Authorization" not in request.headers for request in storage.seen)


def test_a_repo_with_one_file_and_every_way_to_name_it(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"README.md": b"hi", "my lora.safetensors": LORA})
    for reference in (
        "huggingface.co/o/r",
        "https://hf.co/o/r/tree/main",
        "https://huggingface.co/o/r/blob/main/my%20lora.safetensors",
        "https://huggingface.co/o/r/resolve/main/my%20lora.safetensors?download=true",
        f"https://huggingface.co/o/r/tree/{'c' * 40}",
    ):
        assert fetch(places, reference) == LORA
    assert len(storage.seen) == 1
    assert host.asked("/api/models/o/r/revision/main")[0].query == {"blobs": "true"}


CHOICES = [
    ({"a.safetensors": OTHER, "pytorch_lora_weights.safetensors": LORA}, ""),
    ({"a.safetensors": OTHER, "lora.safetensors": LORA}, ""),
    ({"a.safetensors": OTHER, "adapter_model.safetensors": LORA}, ""),
    ({"lora.safetensors": LORA, "checkpoint-500/pytorch_lora_weights.safetensors": OTHER}, ""),
    ({"me.safetensors": LORA, "me_000000500.safetensors": OTHER, "me_000001000.safetensors": OTHER}, ""),
    ({"me.safetensors": LORA, "me-step00000500.safetensors": OTHER}, ""),
    ({"me_000001000.safetensors": OTHER, "me_000002000.safetensors": LORA}, ""),
    ({"v1.safetensors": OTHER, "v2.safetensors": LORA}, ""),
    ({"a.safetensors": OTHER, "sub/b.safetensors": LORA}, "/tree/main/sub"),
    ({"model.tar": PACKED["tar"]}, "/blob/main/model.tar"),
]


@pytest.mark.parametrize(("files", "tail"), CHOICES, ids=[" ".join(files) for files, _ in CHOICES])
def test_the_right_one_of_several_files(
    places: Settings, host: Host, storage: Host, files: dict[str, bytes], tail: str, capfd: pytest.CaptureFixture
) -> None:
    dates = {path: "2026-02-02T00:00:00.000Z" for path, content in files.items() if content == LORA}
    hugging_face(host, storage, "o/r", files, dates=dates)
    assert fetch(places, f"https://huggingface.co/o/r{tail}") == LORA
    (chosen,) = (path for path, content in files.items() if content != OTHER)
    assert chosen in capfd.readouterr().out


def test_several_files_of_one_day_are_listed(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"v1.safetensors": LORA, "v2.safetensors": OTHER, "x/lora.safetensors": LORA})
    said = refusal(places, "huggingface.co/o/r")
    assert "v1.safetensors, v2.safetensors" in said
    assert "huggingface.co/o/r/resolve/main/" in said
    assert "no .safetensors file" in refusal(places, "huggingface.co/o/r/tree/main/empty")
    assert "v1.safetensors, v2.safetensors" in refusal(places, "huggingface.co/o/r/blob/main/v3.safetensors")


ROOT, DEEP = "huggingface.co/o/r", "huggingface.co/o/r/resolve/main/sub/a.safetensors"
PEFT_REPO = {"adapter_model.safetensors": LORA, "adapter_config.json": PEFT}
CONFIGS = [
    (PEFT_REPO, ROOT, PEFT),
    ({"a.safetensors": LORA, "adapter_config.json": OTHER_PEFT, "sub/adapter_config.json": PEFT}, ROOT, OTHER_PEFT),
    ({"a.safetensors": OTHER, "adapter_config.json": OTHER_PEFT, "sub/a.safetensors": LORA}, DEEP, b""),
    ({"adapter_config.json": OTHER_PEFT, "sub/a.safetensors": LORA, "sub/adapter_config.json": PEFT}, DEEP, PEFT),
    ({"adapter_config.json": OTHER_PEFT, "sub/a.safetensors": LORA, "sub/adapter_config.json": PEFT}, ROOT, PEFT),
    ({"adapter_config.json": PEFT, "a.tar": nested(LORA)}, f"{ROOT}/blob/main/a.tar", b""),
    (PEFT_REPO | {"adapter_model.safetensors": OTHER, "lora.safetensors": LORA}, ROOT, b""),
    (PEFT_REPO | {"other.safetensors": OTHER}, ROOT, PEFT),
]


@pytest.mark.parametrize(("files", "reference", "config"), CONFIGS)
def test_the_config_beside_the_file_in_a_repo_comes_along_and_is_fetched_once(
    places: Settings, host: Host, storage: Host, files: dict[str, bytes], reference: str, config: bytes
) -> None:
    hugging_face(host, storage, "o/r", files)
    for _ in range(2):
        assert fetch_config(places, reference) == config
    asked = [request.path for request in storage.seen]
    assert len(asked) == len(set(asked)) <= 2


def test_where_the_config_alone_has_changed_the_weights_are_not_fetched_again(
    places: Settings, host: Host, storage: Host
) -> None:
    for number, configs in enumerate(({}, {"adapter_config.json": PEFT}, {"adapter_config.json": OTHER_PEFT}, {})):
        hugging_face(host, storage, "o/r", {"a.safetensors": LORA} | configs, commit=str(number) * 40)
        host.seen.clear()
        for _ in range(2):
            assert fetch_config(places, ROOT) == configs.get("adapter_config.json", b"")
        assert len(host.seen) == (3 if configs or number == 0 else 2)  # two look-ups, and what has changed
    assert len(storage.seen) == 3  # the weights and two configs


def test_the_same_weights_under_two_configs_are_two_loras(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", PEFT_REPO)
    hugging_face(host, storage, "o/x", PEFT_REPO | {"adapter_config.json": OTHER_PEFT})
    storage.routes["/bare"] = File(LORA)
    cache = WeightsCache(places, QUICK)
    for _ in range(2):
        with cache.open(ROOT) as one, cache.open("huggingface.co/o/x") as other, cache.open(storage.url("/bare")) as it:
            assert one.path == other.path == it.path
            assert [file.config.encode() for file in (one, other, it)] == [PEFT, OTHER_PEFT, b""]
            assert len({one.content, other.content, it.content}) == 3
            assert it.content == it.sha256


@pytest.mark.parametrize("trouble", ["down", 503, 404, 403])
def test_a_config_that_cannot_be_had_is_a_look_up_that_failed(
    places: Settings, host: Host, storage: Host, trouble: str | int, capfd: pytest.CaptureFixture
) -> None:
    hugging_face(host, storage, "o/r", PEFT_REPO)
    assert fetch_config(places, ROOT) == PEFT
    hugging_face(host, storage, "o/r", PEFT_REPO | {"adapter_config.json": OTHER_PEFT}, commit="d" * 40)
    if trouble == "down":
        host.stop()
    else:
        host.routes[f"/o/r/resolve/{'d' * 40}/adapter_config.json"] = status(trouble)
    assert "cannot be" in refusal(replace(places, cache_dir=places.cache_dir / "empty"), ROOT)
    if trouble in ("down", 503):
        assert fetch_config(places, ROOT) == PEFT
        assert "The cached file is used." in capfd.readouterr().out
    else:
        assert f"adapter_config.json cannot be fetched: 127.0.0.1 answered {trouble}" in refusal(places, ROOT)


def test_a_config_that_arrives_cut_is_not_kept(places: Settings, host: Host, storage: Host) -> None:
    stated = {"adapter_config.json": len(PEFT) + 1}
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA, "adapter_config.json": PEFT}, stated=stated)
    said = refusal(places, ROOT)
    assert f"adapter_config.json arrived damaged: it has {len(PEFT)} bytes, but its host states {len(PEFT) + 1}" in said


def test_a_config_that_is_too_long_is_not_even_asked_for(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, stated={"adapter_config.json": MIB // 4 + 1})
    assert "resolve/main/adapter_config.json has more than 0.25 MB" in refusal(places, ROOT)
    assert storage.seen == []
    assert len(host.seen) == 1


LISTS = [
    (trickle(b"HTTP/1.1 200 OK\r\nX-A: "), "cannot be fetched: 127.0.0.1 does not answer."),
    (trickle(b"HTTP/1.1 200 OK\r\n\r\n"), "cannot be fetched: 127.0.0.1 sends less than 1024 bytes a second."),
    (status(200, body=b" " * 9 * MIB), "cannot be looked up: 127.0.0.1 answered with more than 8 MiB."),
    (status(429), "cannot be looked up: 127.0.0.1 answered 429; try again later."),
    (status(400), "cannot be fetched: 127.0.0.1 answered 400."),
    (in_json({"id": "o/r"}), "cannot be looked up: its host names no commit."),
    *(
        (answer, "cannot be looked up: 127.0.0.1 sent something else than an answer.")
        for answer in (
            page(),
            status(204),
            in_json([]),
            in_json({"id": "../r", "sha": "c" * 40, "siblings": []}),
            in_json({"id": "o/r", "sha": "c" * 40, "siblings": [{"rfilename": 5}]}),
            in_json({"id": "o/r", "sha": "c" * 40, "siblings": [{"rfilename": "a", "size": "5"}]}),
        )
    ),
]


@pytest.mark.parametrize(("answer", "sentence"), LISTS)
def test_a_list_that_is_none_or_does_not_come(places: Settings, host: Host, answer: Answer, sentence: str) -> None:
    host.routes["/api/models/o/r/revision/main"] = answer
    assert refusal(places, ROOT, replace(QUICK, pauses=())) == f"{ROOT} {sentence}"


def test_where_dates_cannot_be_had_the_files_are_listed(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"v1.safetensors": LORA, "v2 .safetensors": OTHER})
    path = f"/api/models/o/r/paths-info/{'c' * 40}"
    for answer in (silent, status(500), page(), in_json({"error": "none"}), in_json([{"lastCommit": 5}])):
        host.routes[path] = answer
        assert "v1.safetensors, v2 .safetensors" in refusal(places, ROOT)
    assert host.asked(path)[0].form == "paths=v1.safetensors&paths=v2+.safetensors&expand=true"


def test_a_repo_that_was_renamed_is_asked_with_the_token_and_no_other_host_is(
    places: Settings, host: Host, storage: Host
) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, token=SECRET)
    place = "/api/models/o/r/revision/main"
    host.routes["/api/models/o/old/revision/main"] = redirect(place, 307)
    host.routes["/api/models/o/moved/revision/main"] = redirect(storage.url(place), 307)
    storage.routes[place] = host.routes[place]
    assert fetch(replace(places, hf_token=SECRET), "huggingface.co/o/old") == LORA
    assert "answered 401 Unauthorized; it needs a login" in refusal(
        replace(places, hf_token=SECRET), "huggingface.co/o/moved"
    )
    assert storage.asked(place)[0].headers["Authorization"] is None


def test_private_repos(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, token=SECRET)
    assert "is private and needs HF_TOKEN" in refusal(places, "huggingface.co/o/r")
    wrong = replace(places, hf_token=f"not-{SECRET}")
    assert "the account of HF_TOKEN may not read it" in refusal(wrong, "huggingface.co/o/r")
    assert fetch(replace(places, hf_token=SECRET), "huggingface.co/o/r") == LORA
    assert all("Authorization" not in request.headers for request in storage.seen)


def test_gated_repos(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, token=SECRET, gated=True)
    said = refusal(places, "huggingface.co/o/r")
    assert "accept its conditions at https://huggingface.co/o/r" in said
    assert "HF_TOKEN" in said
    assert fetch(replace(places, hf_token=SECRET), "huggingface.co/o/r") == LORA


def test_a_revision_that_is_not_there(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    assert "no revision 'missing'" in refusal(places, "https://huggingface.co/o/r/tree/missing")


def test_a_commit_is_looked_up_once_and_a_branch_each_time(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, commit="a" * 40)
    for _ in range(2):
        assert fetch(places, "huggingface.co/o/r") == LORA
        assert fetch(places, f"https://huggingface.co/o/r/tree/{'a' * 40}") == LORA
    assert len(host.asked(f"/api/models/o/r/revision/{'a' * 40}")) == 1
    hugging_face(host, storage, "o/r", {"a.safetensors": OTHER}, commit="b" * 40)
    assert fetch(places, "huggingface.co/o/r") == OTHER
    assert fetch(places, f"https://huggingface.co/o/r/tree/{'a' * 40}") == LORA
    assert len(host.asked("/api/models/o/r/revision/main")) == 3


def test_a_file_that_is_not_what_its_host_states(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    storage.routes = dict.fromkeys(storage.routes, File(OTHER))
    assert "arrived damaged" in refusal(places, "huggingface.co/o/r")
    civitai(host, storage, 1, [{"id": 2, "baseModel": "Flux.1 D"}], {2: LORA}, "", page())
    storage.routes = dict.fromkeys(storage.routes, File(OTHER))
    assert "arrived damaged" in refusal(replace(places, civitai_token=""), "civitai.com/models/1")
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    assert fetch(places, "huggingface.co/o/r") == LORA


def test_trigger_words_come_along(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, card={"instance_prompt": "a photo of TOK"})
    civitai(
        host,
        storage,
        1,
        [{"id": 2, "baseModel": "Flux.1 D", "trainedWords": ["ohwx", " sks "]}],
        {2: OTHER},
        "",
        page(),
    )
    labelled = make_lora(seed=5, **{"modelspec.trigger_phrase": "pixar style"})
    replicate(host, storage, "owner/name", PACKED["tar"])
    storage.routes["/a"] = File(labelled)
    for repo in ("o/labelled", "o/copy"):  # of which the second is found by its hash, and does not come again
        hugging_face(host, storage, repo, {"a.safetensors": labelled})
    expected = {
        "huggingface.co/o/labelled": ("pixar style",),
        "huggingface.co/o/copy": ("pixar style",),
        "huggingface.co/o/r": ("a photo of TOK",),
        "civitai.com/models/1": ("ohwx", "sks"),
        storage.url("/a"): ("pixar style",),
        "owner/name": ("TOK",),
    }
    for reference, words in expected.items():
        for _ in range(2):
            with WeightsCache(replace(places, civitai_token=""), QUICK).open(reference) as weights:
                assert weights.trigger_words == words


VERSIONS = [
    {"id": 40, "baseModel": "SDXL 1.0", "publishedAt": "2026-05-01T00:00:00Z"},
    {"id": 30, "baseModel": "Flux.1 D", "publishedAt": "2026-03-01T00:00:00Z"},
    {"id": 35, "baseModel": "Flux.1 S", "publishedAt": "2026-04-01T00:00:00Z"},
    {"id": 50, "baseModel": "Flux.1 D", "publishedAt": "2026-06-01T00:00:00Z", "files": []},
]


CONTENTS = {number: make_lora(seed=number) for number in (30, 35, 40, 50)}


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("civitai.com/models/7", 30),
        ("https://civitai.red/models/7/some-name", 30),
        ("https://civitai.com/models/7?modelVersionId=30", 30),
        ("https://civitai.com/api/download/models/30", 30),
        ("https://civitai.com/api/download/models/40?type=Model&format=SafeTensor", 40),
        ("urn:air:flux1:lora:civitai:7", 30),
        ("urn:air:flux1:lora:civitai:7@30", 30),
    ],
)
def test_civitai_in_all_its_forms(
    places: Settings, host: Host, storage: Host, reference: str, version: int, capfd: pytest.CaptureFixture
) -> None:
    civitai(host, storage, 7, VERSIONS, CONTENTS, SECRET, status(401))
    for _ in range(2):
        assert fetch(replace(places, civitai_token=SECRET), reference) == CONTENTS[version]
    assert len(storage.seen) == 1
    assert (
        f"version {version}, for {next(v['baseModel'] for v in VERSIONS if v['id'] == version)}"
        in capfd.readouterr().out
    )


NEWEST = [
    (["Flux.1 D", "Flux.1 S", "Flux.1 Kontext"], "dev", 1),
    (["Flux.1 D", "Flux.1 S", "Flux.1 Kontext"], "schnell", 2),
    (["Flux.1 D", "Flux.1 Krea", "Flux.1 Fill"], "dev", 2),
    (["Flux.1 D", "Flux.1 Krea", "Flux.1 Fill"], "schnell", 2),
    (["SDXL 1.0", "Flux.1 S", "Flux.2 D"], "dev", 2),
    (["Flux.1 D", "SDXL 1.0", "Flux.1 Something"], "schnell", 1),
    (["Flux.1 D", "Flux.1 D", "flux.1 d"], "dev", 2),
]


@pytest.mark.parametrize(("bases", "model", "chosen"), NEWEST)
def test_the_newest_version_for_what_is_drawn_with(
    places: Settings, host: Host, storage: Host, bases: list[str], model: str, chosen: int
) -> None:
    versions = [
        {"id": number, "baseModel": base, "publishedAt": f"2026-0{number}-01T00:00:00Z"}
        for number, base in enumerate(bases, 1)
    ]
    versions.append({"id": 4, "baseModel": "Flux.1 D", "publishedAt": "2026-09-01T00:00:00Z", "files": []})
    contents = {number: make_lora(seed=number) for number in range(1, 5)}
    civitai(host, storage, 7, versions, contents, SECRET, status(401))
    cache = WeightsCache(replace(places, civitai_token=SECRET), QUICK)
    for other in ("dev", "schnell", model):  # what is drawn with one of them is no answer for the other
        with cache.open("civitai.com/models/7", model=other) as weights:
            found = weights.path.read_bytes()
    assert found == contents[chosen]
    with cache.open("civitai.com/models/7?modelVersionId=3", model=model) as weights:
        assert weights.path.read_bytes() == contents[3]


def test_what_came_by_a_token_in_the_address_is_for_that_token(places: Settings, host: Host, storage: Host) -> None:
    """Hugging Face and CivitAI list hashes of what they give to some alone."""
    hugging_face(host, storage, "o/gated", {"a.safetensors": LORA}, token=SECRET, gated=True)
    hugging_face(host, storage, "o/private", {"a.safetensors": OTHER}, token=SECRET)
    civitai(host, storage, 7, VERSIONS, CONTENTS, SECRET, status(401))
    replicate(host, storage, "owner/name", PACKED["tar"], version=VERSION, token=SECRET)
    pinned = f"huggingface.co/o/private/tree/{'c' * 40}"
    bases = ("huggingface.co/o/gated", pinned, "civitai.com/models/7", f"replicate.com/owner/name/{VERSION}")
    for base in bases:
        for _ in range(2):
            for reference in (
                f"https://{base}?token={SECRET}",
                f"https://me:{SECRET}@{base}",
                f"https://{SECRET}@{base}",
            ):
                assert fetch(places, reference) in (LORA, OTHER, CONTENTS[30])
        refusal(places, base)
        refusal(places, f"https://{base}?token=other")
    assert all("Authorization" not in request.headers for request in storage.seen)
    # By the operator's token, everybody may.
    for base in bases[:3]:
        assert fetch(replace(places, hf_token=SECRET, civitai_token=SECRET), base) in (LORA, OTHER, CONTENTS[30])


def test_whose_token_is_not_enough_is_told(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/gated", {"a.safetensors": LORA}, token=SECRET, gated=True)
    hugging_face(host, storage, "o/private", {"a.safetensors": OTHER}, token=SECRET)
    replicate(host, storage, "owner/name", PACKED["tar"], token=SECRET)
    known = replace(places, hf_token="hf_operators", replicate_token="r8_operators")
    for settings in (places, known):
        said = refusal(settings, "https://huggingface.co/o/gated?token=wrong")
        assert "conditions at https://huggingface.co/o/gated with the account of the token in the address." in said
        said = refusal(settings, "https://huggingface.co/o/private?token=wrong")
        assert said.endswith("is private and the account of the token in the address may not read it.")
        said = refusal(settings, "https://replicate.com/owner/name?token=wrong")
        assert "or is private and the account of the token in the address may not read it" in said
        assert "wrong" not in said


@pytest.mark.parametrize("denied", [status(401), status(403), redirect("/login"), page()])
def test_civitai_without_a_token(places: Settings, host: Host, storage: Host, denied: Callable) -> None:
    host.routes["/login"] = page()
    civitai(host, storage, 7, VERSIONS, CONTENTS, SECRET, denied)
    assert "it needs CIVITAI_API_TOKEN" in refusal(places, "civitai.com/models/7")
    wrong = replace(places, civitai_token=f"not-{SECRET}")
    assert "the token is not accepted" in refusal(wrong, "civitai.com/models/7")
    assert fetch(places, f"https://civitai.com/api/download/models/30?token={SECRET}") == CONTENTS[30]


def test_what_civitai_does_not_have(places: Settings, host: Host, storage: Host) -> None:
    civitai(host, storage, 7, VERSIONS[:1], CONTENTS, "", page())
    assert refusal(places, "civitai.com/models/7") == (
        "civitai.com/models/7 has no version for FLUX.1 [dev] or [schnell]; it is for SDXL 1.0 (version 40). Where "
        "one of these is meant, it must be named, as civitai.com/models/7?modelVersionId=…."
    )
    assert "no such model" in refusal(places, "civitai.com/models/8")
    assert "no such version" in refusal(places, "civitai.com/models/8?modelVersionId=9")
    host.routes["/api/v1/models/9"] = page()
    assert "something else than an answer" in refusal(places, "civitai.com/models/9")
    for answer in ([], {}, {"modelVersions": None}, {"modelVersions": [{}]}, {"modelVersions": [{"files": 3}]}):
        host.routes["/api/v1/models/9"] = in_json(answer)
        assert "civitai.com/models/9" in refusal(places, "civitai.com/models/9")


@pytest.mark.parametrize("place", ["@{host}/a", "//{host}/a", "a", "http://[", "file:///a", 5, ["a"]])
def test_where_a_file_of_civitai_is_said_to_lie_leads_to_no_other_host(
    places: Settings, host: Host, storage: Host, place: object
) -> None:
    link = place.format(host=storage.address.removeprefix("http://")) if isinstance(place, str) else place
    file = {"name": "a.safetensors", "downloadUrl": link}
    version = {"id": 2, "baseModel": "Flux.1 D", "files": [file]}
    host.routes["/api/v1/models/9"] = in_json({"modelVersions": [version]})
    said = refusal(replace(places, civitai_token=SECRET), "civitai.com/models/9")
    assert said == "civitai.com/models/9 cannot be looked up: 127.0.0.1 sent something else than an answer."
    assert storage.seen == []


def test_a_version_of_civitai_without_files_or_base_stands_in_no_other_s_way(places: Settings, host: Host) -> None:
    versions = [{"id": 1, "files": None}, {"id": 5, "files": [{"name": "a.safetensors"}]}]
    host.routes["/api/v1/models/7"] = in_json({"modelVersions": versions})
    assert "it is for a model without a name (version 5). Where" in refusal(places, "civitai.com/models/7")


@pytest.mark.parametrize("odd", [5, {"a": SECRET}, [[SECRET]], True, ["a", None]])
def test_trigger_words_of_odd_types_are_left_out(places: Settings, host: Host, storage: Host, odd: object) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, card={"instance_prompt": odd})
    with WeightsCache(places, QUICK).open("huggingface.co/o/r") as weights:
        assert weights.trigger_words == (("a",) if odd == ["a", None] else ())
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    info = {"id": "o/r", "sha": "c" * 40, "siblings": [{"rfilename": "a.safetensors"}], "cardData": odd}
    host.routes["/api/models/o/r/revision/main"] = in_json(info)
    assert fetch(places, "huggingface.co/o/r") == LORA


def test_trigger_words_show_no_secret(places: Settings, host: Host, storage: Host) -> None:
    address = f"see https://u:{SECRET}@example.com/a?token={SECRET}"
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA}, card={"instance_prompt": address})
    storage.routes["/a"] = File(make_lora(seed=5, **{"modelspec.trigger_phrase": address}))
    for reference in ("huggingface.co/o/r", storage.url("/a")):
        with WeightsCache(places, QUICK).open(reference) as weights:
            assert weights.trigger_words == ("see https://example.com/a",)


@pytest.mark.parametrize("end", ["\n", "\r", "\v", "\f", "\x1c", "\x1e", "\x85", "\u2028", "\u2029"])
def test_what_others_named_cannot_pretend_to_be_something_else_in_the_log(
    places: Settings, host: Host, storage: Host, capfd: pytest.CaptureFixture, end: str
) -> None:
    """Clients take the last line that looks like a progress bar for one."""
    bar = f"x{end}100%|####| 28/28 \x1b[2J\u202e"
    versions = [{"id": 2, "baseModel": f"Flux.1 {bar}", "trainedWords": [bar, "\ud800"]}]
    civitai(host, storage, 1, versions, {2: LORA}, "", page())
    hugging_face(host, storage, "o/r", {f"{bar}.safetensors": OTHER}, card={"instance_prompt": bar})
    storage.routes["/tar"] = File(make_tar({f"{bar}/a.safetensors": make_lora(seed=5), f"{bar}/config.yaml": b""}))
    storage.routes["/zip"] = File(make_zip({f"{bar}/a.safetensors": make_lora(seed=6)}))
    storage.routes["/two"] = File(make_tar({f"{bar}/a.safetensors": LORA, f"{bar}/b.safetensors": OTHER}))
    header = json.dumps({bar: {"dtype": bar, "shape": [1], "data_offsets": [0, 4]}}).encode()
    storage.routes["/header"] = File(len(header).to_bytes(8, "little") + header + bytes(4))
    storage.routes["/moved"] = redirect(f"http://a{end}x.invalid/".encode().decode("latin-1"))
    print(refusal(places, "civitai.com/models/1"))
    version = "civitai.com/models/1?modelVersionId=2"
    for reference in (version, "huggingface.co/o/r", storage.url("/tar"), storage.url("/zip")):
        with WeightsCache(replace(places, civitai_token=""), QUICK).open(reference) as weights:
            print(*weights.trigger_words, weights.name)
    for path in ("/two", "/header", "/moved"):
        print(refusal(places, storage.url(path)))
    print(refusal(places, f"http://127.0.0.1:1/{end}x100%|####| 28/28"))
    printed = "".join(capfd.readouterr())
    assert "28/28" in printed
    assert all(line.isprintable() and not line.startswith("100%") for line in printed.split("\n"))


def test_hugging_face_and_civitai_are_asked_again_too(places: Settings, host: Host, storage: Host) -> None:
    hugging_face(host, storage, "o/r", {"a.safetensors": LORA})
    civitai(host, storage, 1, [{"id": 2, "baseModel": "Flux.1 D"}], {2: OTHER}, "", page())
    for path in ("/api/models/o/r/revision/main", "/api/v1/models/1"):
        host.routes[path] = in_turn(status(503), status(429, {"Retry-After": "0"}), host.routes[path])
    assert fetch(places, "huggingface.co/o/r") == LORA
    assert fetch(replace(places, civitai_token=""), "civitai.com/models/1") == OTHER
    host.routes["/api/models/o/x/revision/main"] = status(500)
    assert "answered 500; try again later" in refusal(places, "huggingface.co/o/x")

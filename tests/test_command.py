"""What a command line becomes before a server starts, and what becomes of pictures; see tests/test_scripts.py, too."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import images
from local_cog import schema
from local_cog.inputs import DRAWN_BY, read_inputs
from local_cog.outputs import Place
from local_cog.server import CogServer, failure, files
from request import LoraChoice
from service.data_uri import file_uri
from settings import ROOT
from tests.support.processes import finished

DOCUMENT = schema.derive((ROOT / "predict.py").read_text(encoding="utf-8"))
# A request that Cog lets pass, and the predictor refuses at once.
PASSES = {"prompt": "a", "extra_lora": "file:///a"}
SMALL = {"prompt": "a red fox", "megapixels": "0.25", "num_inference_steps": 2, "disable_safety_checker": True}
# A minimal predictor: it prints how often it draws, and writes a file to a given place.
PREDICTOR = """
from cog import BasePredictor, Input, Path


class Predictor(BasePredictor):
    def predict(
        self,
        prompt: str = Input(description="a file"),
        num_outputs: int = Input(default=1, ge=1, le=4),
        output_format: str = Input(default="webp", choices=["webp", "jpg", "png"]),
    ) -> list[Path]:
        if prompt:
            Path(prompt).touch()
        outputs = [Path(f"out.{number}.{output_format}") for number in range(num_outputs)]
        for output in outputs:
            output.write_text(output.name)
        return outputs
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files here, some of which are called as LoRAs are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "styles").mkdir()
    for name in ("my.safetensors", "photo.jpg", "zorp", "owner/name", "./my lora.zip"):
        (tmp_path / name).write_bytes(b"a")


def test_a_prompt_may_begin_with_the_sign_of_a_file() -> None:
    assert read_inputs(["prompt=@zorp", "extra_lora=@zorp"], DOCUMENT) == {
        "prompt": "@zorp",
        "extra_lora": file_uri(Path("zorp")),
    }


@pytest.mark.parametrize(
    ("key", "value", "quoted"),
    [
        ("replicate_weights", "my.safetensors", "replicate_weights=@my.safetensors"),
        ("extra_lora", "./my lora.zip", "'extra_lora=@./my lora.zip'"),
        ("extra_lora", "./zorp", "extra_lora=@./zorp"),
        ("image", "photo.jpg", "image=@photo.jpg"),
        ("mask", "zorp", "mask=@zorp"),
    ],
)
def test_the_name_of_a_file_without_its_sign_is_refused(key: str, value: str, quoted: str) -> None:
    sentence = f"{key} is {value!r}, which is a file here; -i {quoted} sends it."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        read_inputs(["prompt=a", f"{key}={value}"], DOCUMENT)
    sent = read_inputs(["prompt=a", f"{key}=@{value}"], DOCUMENT)
    assert sent[key].startswith("data:")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", "photo.jpg"),
        ("replicate_weights", "zorp"),
        ("extra_lora", "owner/name"),
        ("extra_lora", "styles"),
        ("replicate_weights", "missing.safetensors"),
        ("extra_lora", f"data:,{'a' * 5000}"),
        ("image", "https://example.com/photo.jpg"),
        ("image", "photo\0.jpg"),
        ("extra_lora", "~nobody-of-that-name/a.zip"),
    ],
)
def test_what_may_mean_something_else_is_sent_as_it_is(key: str, value: str) -> None:
    assert read_inputs(["prompt=a", f"{key}={value}"], DOCUMENT)[key] == value


@pytest.mark.parametrize("value", ["~nobody-of-that-name/a.png", "a" * 5000, "a\0", "", "."])
def test_what_is_no_file_behind_the_sign_is_said(value: str) -> None:
    with pytest.raises(ValueError, match=f"^image: there is no file {re.escape(repr(value))}\\.$"):
        read_inputs(["prompt=a", f"image=@{value}"], DOCUMENT)


def test_each_wrong_input_gets_a_sentence() -> None:
    wrong = ["num_outputs=9", "lora_scale=-1.5", "go_fast=yes", "aspect_ratio=16x9", "seed=a", "image=@no.png"]
    with pytest.raises(ValueError, match="is") as refused:
        read_inputs(wrong, DOCUMENT)
    ratios = "1:1, 16:9, 21:9, 3:2, 2:3, 4:5, 5:4, 3:4, 4:3, 9:16, 9:21, custom"
    assert sorted(str(refused.value).split("\n")) == [
        'The input prompt is missing; script/predict -i prompt="a red fox" gives one.',
        f"aspect_ratio is '16x9' (did you mean 16:9?); it must be one of {ratios}.",
        "go_fast is 'yes'; it must be true or false.",
        "image: there is no file 'no.png'.",
        "lora_scale is -1.5; it must be at least -1.",
        "num_outputs is 9; it must be at most 4.",
        "seed is 'a'; it must be a whole number.",
    ]


def test_what_is_refused_before_a_server_starts_is_what_the_server_refuses(server: CogServer, tmp_path: Path) -> None:
    """Values as they are typed; those of another type, as a picture may have them, are also read from one."""
    typed = {
        "prompt": ["", "null", "a\0b", "a\udcff", "狐"],
        "num_outputs": ["0", "1", "4", "5", "2.0", "2.5", "4e0", "inf", "two", "", "1" * 30, "null"],
        "seed": ["-1", "9" * 20, "9" * 308, "9" * 400, "1e30", "nan", "true"],
        "guidance_scale": ["0", "10", "10.000001", "-0.0", "1e999", "NaN", ".5", "high"],
        "go_fast": ["true", "FALSE", "1", "yes", ""],
        "megapixels": ["1", "1.0", "0.25"],
        "aspect_ratio": ["16x9", "16:9", "", "@photo.jpg", "null"],
        "model": ["DEV", "schnell "],
        "width": ["255", "256", "1440", "1441", "null"],
        "replicate_weights": ["", "null", "zorp"],
    }
    written: list[Any] = [None, True, "1", 1, 1.5, 2.0, 10**25, -1, [], {}, "dev", "\ud83e"]
    cases = [(key, meant(text), [f"{key}={text}"], None) for key, texts in typed.items() for text in texts]
    # Of an image that is not in the picture, more is asked for.
    for key, value in ((key, value) for key in DRAWN_BY for value in written if key != "prompt_strength"):
        images.save(Image.new("RGB", (8, 8)), path := tmp_path / f"{len(cases)}.png", "png", 80, {key: value})
        cases.append((key, value, [], path))
    for key, value, pairs, like in cases:
        given = ["extra_lora=file:///a", *([] if key == "prompt" else ["prompt=a"]), *pairs]
        refused = None
        try:
            inputs = read_inputs(given, DOCUMENT, like)
        except ValueError as error:
            inputs, refused = PASSES | {key: value}, str(error)
        assert ("status" in server.predict(inputs)) == (refused is None), (key, value)
        assert refused is None or key in refused


def meant(text: str) -> object:
    """The value of a text as JSON, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


# Drawing again

CUSTOM = {"aspect_ratio": "custom", "width": 256, "height": 320}
MADE: dict[str, Any] = {"prompt": "a red fox", "seed": 3, "replicate_weights": "[]"}


def picture(said: object, name: str = "fox.png") -> Path:
    images.save(Image.new("RGB", (8, 8)), Path(name), name[-3:], 80, said)
    return Path(name)


@pytest.mark.parametrize(
    "inputs",
    [
        {"aspect_ratio": "3:2", "num_outputs": 2, "guidance_scale": 2.5},
        {**CUSTOM, "megapixels": "1", "model": "schnell", "output_format": "webp"},
        {"go_fast": True, "replicate_weights": "zorp*0.5 + bold", "extra_lora": "dusk", "extra_lora_scale": -1},
        {"prompt_strength": 0.5, "megapixels": "1"},
    ],
)
def test_like_a_picture_the_same_is_drawn(
    server: CogServer, inputs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    images.save(Image.new("RGB", (64, 96), "red"), Path("photo.png"), "png", 80, {})
    from_image = {"image": file_uri(Path("photo.png"))} if "prompt_strength" in inputs else {}
    answer = server.predict(SMALL | {"output_format": "png"} | inputs | from_image)
    assert failure(answer) is None
    for suffix, content in files(answer):
        Path(f"fox{suffix}").write_bytes(content)
        pairs = ["disable_safety_checker=true", f"output_format={suffix[1:]}"]
        pairs += ["image=@photo.png"] if from_image else []
        again = server.predict(read_inputs(pairs, DOCUMENT, Path(f"fox{suffix}")))
        assert files(again) == [(suffix, content)]
    assert capsys.readouterr().err == ""  # all that it says was taken


@pytest.mark.parametrize(
    ("pairs", "said", "inputs"),
    [
        (["seed=7"], MADE | CUSTOM, MADE | CUSTOM | {"seed": 7}),
        (["seed=null"], MADE, {"prompt": "a red fox", "replicate_weights": "[]"}),
        (["replicate_weights="], MADE, MADE | {"replicate_weights": ""}),
        (["aspect_ratio=16:9"], MADE | CUSTOM, MADE | {"aspect_ratio": "16:9"}),
        (["aspect_ratio=null"], MADE | CUSTOM, MADE),
        (["width=512"], MADE | CUSTOM, MADE | CUSTOM | {"width": 512}),
        (["aspect_ratio=custom"], MADE | {"megapixels": "0.25"}, MADE | {"aspect_ratio": "custom"}),
        (["image=a"], MADE | CUSTOM, MADE | {"image": "a"}),
        (["image=a"], MADE | {"prompt_strength": 0.5}, MADE | {"prompt_strength": 0.5, "image": "a"}),
        (["prompt_strength=null"], MADE | {"prompt_strength": 0.5}, MADE),
        (["prompt=a"], MADE | {"cut": "prompt"}, MADE | {"prompt": "a"}),
        (["replicate_weights=zorp"], MADE | {"replicate_weights": '[{"path": "sha256:e1b3", "scale": 1.0}]'}, None),
        (["seed=7"], MADE | {"seed": "many"}, MADE | {"seed": 7}),
        ([], MADE | {"seed": None}, {"prompt": "a red fox", "replicate_weights": "[]"}),
    ],
)
def test_what_is_said_comes_before_what_the_picture_says(
    pairs: list[str], said: dict[str, Any], inputs: dict[str, Any] | None
) -> None:
    assert read_inputs(pairs, DOCUMENT, picture(said)) == (inputs or MADE | {"replicate_weights": "zorp"})


LORA = {"replicate_weights": '[{"path": "sha256:e1b337fcd883", "scale": 1.0}]'}
OWN = {"replicate_weights": json.dumps([LoraChoice("zorp/", trusted=True).entry("zorp")])}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (MADE | {"prompt_strength": 0.5}, "fox.png was drawn from an image, which is not in it; add -i image=@…, and "),
        (MADE | LORA, "fox.png was drawn with a LoRA that came within its request; add -i replicate_weights=@…, and "),
        (
            MADE | OWN,
            "fox.png was drawn with a LoRA that COG_WEIGHTS named; add -i replicate_weights= where it still does",
        ),
        (MADE | {"cut": "prompt"}, "fox.png had room for a part of its prompt alone; add -i prompt=…."),
        (MADE | {"seed": "many"}, "fox.png: seed is 'many'; it must be a whole number."),
        (MADE | {"seed": float("nan")}, "fox.png: seed is NaN; it must be a whole number."),
        (MADE | {"model": ["dev"]}, """fox.png: model is ["dev"]; it must be text in UTF-8."""),
        ({"seed": 3}, 'The input prompt is missing; script/predict -i prompt="a red fox" gives one.'),
    ],
)
def test_what_a_picture_lacks_or_has_wrong_is_said(said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        read_inputs([], DOCUMENT, picture(said))


def test_what_is_no_picture_of_ours_is_said() -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    for name in ("plain.png", "zorp"):
        with pytest.raises(ValueError, match=f"^{name} does not say how it was drawn; "):
            read_inputs([], DOCUMENT, Path(name))
    for name in ("missing.png", "styles", "~nobody-of-that-name/a"):
        with pytest.raises(ValueError, match=f"^--like: there is no file '{name}'\\.$"):
            read_inputs([], DOCUMENT, Path(name))


def test_a_stranger_s_picture_neither_fetches_nor_switches_off(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = {"image": "http://127.0.0.1/", "disable_safety_checker": True, "x\n": 1}
    assert read_inputs([], DOCUMENT, picture(MADE | theirs, "fox.jpg")) == MADE
    assert capsys.readouterr().err == (
        "fox.jpg also says 'image', 'disable_safety_checker', 'x\\n', which --like does not take.\n"
    )


# The command itself


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command beside a small predictor."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("local_cog", "service"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "settings.py", folder)
    (folder / "predict.py").write_text(PREDICTOR)
    return folder


def run(project: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    """The command, run where the test is."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    temporary = Path("temporary")
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(project), "TMPDIR": str(temporary.absolute())}
    command = [sys.executable, "-P", "-m", "local_cog.command", *words]
    return subprocess.run(command, env=environment, text=True, timeout=120, check=False, **options)


def test_the_command_draws_a_picture_again(server: CogServer) -> None:
    ((_, content),) = files(server.predict(SMALL | {"output_format": "png"}))
    Path("a fox.png").write_bytes(content)
    done = run(ROOT, "--like", "a fox.png", "-i", "disable_safety_checker=true", "-o", "new/again.PNG")
    assert (done.returncode, done.stdout) == (0, "new/again.PNG\n"), done.stderr
    assert Path("new/again.PNG").read_bytes() == content


def test_a_name_is_a_file_s_and_what_it_replaces_is_said(project: Path) -> None:
    done = run(project, "-i", "prompt=", "-o", "fox.jpeg")
    assert (done.stdout, Path("fox.jpeg").read_text()) == ("fox.jpeg\n", "out.0.jpg"), done.stderr
    Path("fox.1.png").touch()
    done = run(project, "-i", "prompt=", "-i", "num_outputs=2", "-o", "fox.png")
    assert done.stdout == "fox.0.png\nfox.1.png\n", done.stderr
    assert done.stderr.splitlines()[-1] == "Replaced fox.1.png."
    assert Path("fox.1.png").read_text() == "out.1.png"


def test_what_was_drawn_is_kept_though_it_cannot_be_written_where_it_should(project: Path, tmp_path: Path) -> None:
    done = run(project, "-i", f"prompt={tmp_path / 'folder'}", "-i", "num_outputs=2", "-o", "folder/fox.webp")
    kept = [Path(line) for line in done.stdout.splitlines()]
    assert [path.read_text() for path in kept] == ["out.0.webp", "out.1.webp"]
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"folder/fox.0.webp could not be written: File exists. What was drawn is in {kept[0].parent}."
    )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_picture_is_there_when_nobody_reads_what_is_printed(project: Path, stream: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody:  # noqa: PTH123
        done = run(project, "-i", "prompt=", **{stream: nobody})
    assert (done.returncode, Path("output.0.webp").read_text()) == (0, "out.0.webp")
    assert (done.stdout or "") + (done.stderr or "") in ("Starting the Cog server.\n", "output.0.webp\n")


def test_a_closed_stderr_gets_nothing_onto_stdout(project: Path) -> None:
    done = run(project, "-i", "prompt=", preexec_fn=lambda: os.close(2))
    assert (done.returncode, done.stdout) == (0, "output.0.webp\n")


def test_a_picture_without_room_leaves_the_one_that_is_there(project: Path, small_disk: Path) -> None:
    there = small_disk / "fox.webp"
    there.write_bytes(b"an earlier one")
    (small_disk / "more").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    done = run(project, "-i", "prompt=", "-o", str(there))
    assert (done.returncode, there.read_bytes()) == (1, b"an earlier one")
    assert f"{there} could not be written: No space left on device. What was drawn is in " in done.stderr
    assert Path(done.stdout.strip()).read_text() == "out.0.webp"
    assert sorted(path.name for path in small_disk.iterdir()) == ["fox.webp", "more", "rest"]


def test_a_picture_takes_the_place_of_another_as_if_written_into_it(project: Path, tmp_path: Path) -> None:
    """Its permissions and links to it stay; names may be of any length and of any bytes."""
    Path("zorp").chmod(0o600)
    Path("link.webp").symlink_to("zorp")
    done = run(project, "-i", "prompt=", "-o", "link.webp")
    assert (done.returncode, Path("zorp").read_text()) == (0, "out.0.webp"), done.stderr
    assert Path("link.webp").is_symlink()
    assert Path("zorp").stat().st_mode & 0o777 == 0o600
    Path("loop.webp").symlink_to("loop.webp")
    for name in ("loop.webp", "a" * 250 + ".webp", "\udcff.webp"):
        done = run(project, "-i", "prompt=", "-o", name, encoding="utf-8", errors="surrogateescape")
        assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr
        assert Path(name).read_text() == "out.0.webp"
    assert not list(tmp_path.glob(".*"))


def test_a_pipe_is_no_place_for_a_picture(project: Path, tmp_path: Path) -> None:
    os.mkfifo("fox.webp")
    done = run(project, "-i", "prompt=drawn", "-o", "fox.webp")
    sentence = f"No picture can be written to the folder {tmp_path}: fox.webp is no file.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)
    assert not (project / "drawn").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_stdout_is_said_in_one_sentence(project: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(project, "-i", "prompt=", "-o", "fox.webp", stdout=full)
    assert (done.returncode, Path("fox.webp").read_text()) == (1, "out.0.webp")
    assert done.stderr.splitlines()[1:] == ["The paths of the pictures could not be printed: No space left on device."]


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["a red fox"], "-i prompt='a red fox'"),
        (["fox", "-i", "num_outputs=2"], "-i prompt=fox"),
        (["-i", "prompt=a", "red", "fox's"], """-i prompt='a red fox'"'"'s'"""),
        (["-i", "prompt=a", "-i", "output_format=zorp*0.8", "+", "bold"], "-i output_format='zorp*0.8 + bold'"),
        (["-i", "prompt", "fox"], "-i prompt=fox"),
        (["prompt=a red fox"], "-i prompt='a red fox'"),
        (["prompt=a", "red", "fox", "seed=7"], "-i prompt='a red fox'"),
        (["-i", "prompt=a", "seed=7"], "-i seed=7"),
        (["-i", "prompt=a", "red", "fox", "seed=7"], "-i prompt='a red fox'"),
        (["-i", "prompt=a", "-o", "my", "fox.webp"], "-o 'my fox.webp'"),
        (["--like", "my", "fox.webp"], "--like 'my fox.webp'"),
        (["--", "a", "fox"], "-i prompt='a fox'"),
        (["-o", "x.webp", "prompt=a", "fox"], "-i prompt='a fox'"),
        (["-i", "prompt=a", "red", "-o", "my", "fox.webp"], "-i prompt='a red'"),
    ],
)
def test_words_without_a_name_get_one(project: Path, words: list[str], right: str) -> None:
    done = run(project, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Inputs are given by name, and with quotes around spaces: {right} is right.\n"


@pytest.mark.parametrize(
    ("name", "inputs", "sentence"),
    [
        ("fox.gif", {}, "-o ends in .gif; it must end in one of .webp, .jpg, .png, or in / for a folder."),
        ("fox.png", {"output_format": "jpg"}, "-o ends in .png, and output_format is jpg; both must say the same."),
    ],
)
def test_the_name_of_a_file_and_its_format_must_agree(name: str, inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Place.read(name).agree(inputs, DOCUMENT)


@pytest.mark.parametrize(
    ("name", "folder", "reason"),
    [
        ("zorp/fox.png", "zorp", "zorp is no folder"),
        ("zorp", "zorp", "zorp is no folder"),
        ("zorp/new/", "zorp/new", "zorp is no folder"),
        (f"{'a' * 300}/fox.png", "a" * 300, "File name too long"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused(name: str, folder: str, reason: str, tmp_path: Path) -> None:
    sentence = f"No picture can be written to the folder {tmp_path / folder}: {reason}."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Place.read(name).check()


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("", ["output.0.webp", "output.1.webp"]),
        ("owner", ["owner/output.0.webp", "owner/output.1.webp"]),
        ("new/v1.0/", ["new/v1.0/output.0.webp", "new/v1.0/output.1.webp"]),
        ("../fox.webp", ["../fox.0.webp", "../fox.1.webp"]),
    ],
)
def test_several_pictures_have_numbers(name: str, paths: list[str]) -> None:
    place = Place.read(name)
    place.check()
    assert [str(place.path(number, 2, ".webp")) for number in range(2)] == paths


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_of_somebody_else_s_is_refused() -> None:
    code = "import os; from local_cog.outputs import Place; os.setuid(65534); Place.read('/etc/a/fox.png').check()"
    done = finished([sys.executable, "-c", code])
    assert done.stderr.splitlines()[-1] == (
        "ValueError: No picture can be written to the folder /etc/a: /etc may not be written."
    )

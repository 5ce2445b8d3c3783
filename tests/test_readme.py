"""What README prints is run as it stands, where a reader would run it; what it quotes is said somewhere."""

import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.hosts import Host, civitai, hugging_face, replicate, status
from harness.waiting import wait_until
from local_cog.server import free_port
from settings import MINIATURE, ROOT
from tests.support.fetching import make_tar
from tests.support.processes import finished

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Of the shell, a block that says so itself is not run, and script/test is what runs here.
NOT_HERE = "not run here"
SERVERS = ("script/serve", "script/cluster", "script/playground")
TOKEN = "s3cr3t-of-civitai"
# Longer than any block takes on a machine that has other work.
LONGEST = 300


def sections() -> dict[str, list[tuple[str, str]]]:
    """The blocks of code under each heading: language and code."""
    found = {}
    for section in re.split(r"^##+ ", README, flags=re.MULTILINE):
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        found[section.partition("\n")[0]] = [(language, code) for language, code in blocks if NOT_HERE not in code]
    return {heading: blocks for heading, blocks in found.items() if blocks}


@pytest.fixture
def reader(tmp_path: Path, host: Host, storage: Host) -> Path:
    """A folder with a reader's own files, from which the scripts are called; LoRAs of the web lie on loopback."""
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "script").symlink_to(ROOT / "script")
    Image.linear_gradient("L").resize((768, 512)).convert("RGB").save(folder / "photo.jpg")
    Image.linear_gradient("L").resize((768, 512)).point(lambda grey: 255 * (grey > 128)).save(folder / "mask.png")
    shutil.copy(ROOT / "mini" / "loras" / "dusk.safetensors", folder / "my-lora.safetensors")
    lora = (folder / "my-lora.safetensors").read_bytes()
    hugging_face(host, storage, "XLabs-AI/flux-RealismLora", {"lora.safetensors": lora})
    version = {"id": 1, "baseModel": "Flux.1 D", "status": "Published"}
    civitai(host, storage, 639937, [version], {1: lora}, TOKEN, status(401))
    replicate(host, storage, "fofr/flux-pixar-cars", make_tar({"output/flux_train_replicate/lora.safetensors": lora}))
    return folder


@pytest.fixture
def environment(tmp_path: Path, host: Host) -> Mapping[str, str]:
    """A reader's environment, with a safety check that finds nothing: that of the miniature errs at some seeds."""
    shutil.copytree(MINIATURE.safety_checker, tmp_path / "checker")
    weights = tmp_path / "checker" / "model.safetensors"
    thresholds = {"concept_embeds_weights": torch.full((17,), 2.0, dtype=torch.float16)}  # no cosine is as large
    save_file(load_file(weights) | thresholds, weights, metadata={"format": "pt"})
    endpoints = dict.fromkeys(("HF_ENDPOINT", "CIVITAI_ENDPOINT", "REPLICATE_ENDPOINT"), host.address)
    own = {"WEIGHTS_CACHE": str(tmp_path / "weights"), "WEIGHTS_ALLOW_PRIVATE_HOSTS": "1", "CIVITAI_API_TOKEN": TOKEN}
    own |= {"SAFETY_CHECKER": str(tmp_path / "checker")}
    data = {"DATABASE_URL": f"sqlite:///{tmp_path / 'predictions.db'}", "FILES_URL": str(tmp_path / "files")}
    python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return {**os.environ, **endpoints, **own, **data, **python}


@contextlib.contextmanager
def running(command: str, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A server that a block starts, from when it says that it is ready."""
    log = folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "Ready: http" in log.read_text(errors="replace") or server.poll() is not None, LONGEST)
        assert server.poll() is None, log.read_text(errors="replace")
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def run(language: str, code: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Run a block to its end; the pictures that it names are there then."""
    match language:
        case "sh":
            command = ["bash", "-euo", "pipefail", "-c", code]
        case "python":
            command = [sys.executable, "-c", code]
        case "js":
            (folder / "snippet.mjs").write_text(code)
            command = ["node", "snippet.mjs"]
    done = finished(command, cwd=folder, env=environment, timeout=LONGEST)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    for name in re.findall(r"[\w-]+(?:\.\d)?\.(?:webp|png)\b", code + done.stdout):
        with Image.open(folder / name) as picture:
            picture.load()
    # A line of the log for each LoRA: those of a sum have a factor each, and `--like` names none.
    wanted = sum(
        max(1, line.count("*")) for line in code.splitlines() if "script/predict" in line and "_weights" in line
    )
    assert done.stderr.count(" tensors.\n") >= wanted, done.stderr


@pytest.mark.parametrize("heading", sections())
def test_what_is_printed_works_as_printed(
    heading: str, reader: Path, environment: Mapping[str, str], host: Host, request: pytest.FixtureRequest
) -> None:
    blocks = sections()[heading]
    printed = "".join(code for _, code in blocks)
    if "script/cluster" in printed and find_spec("ray") is None:
        pytest.skip("the cluster needs cluster/requirements.txt")
    if "curl " in printed and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    if "js" in dict(blocks):
        (reader / "node_modules").symlink_to(request.getfixturevalue("node_modules"))
    ports = {port: str(free_port()) for port in ("5000", "7860", "8000")}
    with contextlib.ExitStack() as stack:
        for language, code in blocks:
            code = re.sub(
                rf"\b(?:{'|'.join(ports)})\b", lambda found: ports[found[0]], code.replace("script/test\n", "")
            )
            if code.startswith(SERVERS):
                stack.enter_context(running(code.strip(), reader, environment))
            else:
                run(language, code, reader, environment)
    for place in re.findall(r"(?:huggingface\.co|fofr|civitai\.com/models)/([\w-]+)", printed):
        assert any(place in asked.path for asked in host.seen)


def sentences() -> list[str]:
    """What the product may say: all its texts, with … where one has a value."""
    found = []
    for path in ROOT.glob("**/*.py"):
        wing = path.relative_to(ROOT).parts[0]
        if wing in (".venv", "tests", "harness", "bench", "mini"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(it.value if isinstance(it, ast.Constant) else "…" for it in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_each_sentence_that_is_explained_is_one_that_is_said() -> None:
    rows = README.partition("## When it does not work\n")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `(.*?)`", rows, flags=re.MULTILINE)
    said = [*sentences(), "At capacity - all prediction slots busy"]  # Cog's own; tests/test_scripts.py meets it
    assert len(quoted) > 10
    for quote in quoted:
        parts = [part.strip() for part in quote.split("…") if part.strip()]
        assert any(all(part in sentence for part in parts) for sentence in said), quote


def test_each_link_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (ROOT / target.partition("#")[0]).exists(), target

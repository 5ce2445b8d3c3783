import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import local_cog.server
from harness.waiting import wait_until
from local_cog import schema
from local_cog.inputs import read_inputs
from local_cog.server import CogServer, check_address, failure, files, url
from settings import ROOT

# A minimal predictor: it succeeds, fails, takes long, or does not start.
PREDICTOR = """
import os
import time

from cog import BasePredictor, Input, Path
from tqdm import tqdm


class Predictor(BasePredictor):
    def setup(self) -> None:
        if os.environ.get("BROKEN"):
            raise ValueError("BROKEN is set; it must not be.")

    def healthcheck(self) -> bool:
        if os.environ.get("UNWELL"):
            raise ValueError("The live weights are not what they were.")
        return True

    def predict(
        self,
        prompt: str = Input(description="what to do"),
        image: Path | None = Input(default=None),
        steps: int = Input(default=4, ge=1, le=50),
        strength: float = Input(default=1),
        fast: bool = Input(default=False),
        model: str = Input(default="dev", choices=["dev", "schnell"]),
    ) -> list[Path]:
        for _ in tqdm(range(steps)):
            time.sleep(1 if prompt == "slow" else 0.01)
        if prompt == "fail":
            raise ValueError("A mask needs an image.")
        if prompt == "native":
            sum(range(10**12))
        output = Path("out.webp")
        output.write_bytes(image.read_bytes() if image else f"{steps!r} {strength!r} {fast!r} {model!r}".encode())
        return [output]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project's scripts around the small predictor, with this environment's packages."""
    directory = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "script", directory / "script")
    shutil.copytree(ROOT / "local_cog", directory / "local_cog")
    shutil.copytree(ROOT / "service", directory / "service")
    for path in [ROOT / "settings.py", *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, directory)
    (directory / ".venv").symlink_to(Path(sys.prefix))
    (directory / "predict.py").write_text(PREDICTOR)
    return directory


def script(project: Path, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the project to its end."""
    return subprocess.run(
        [project / "script" / command[0], *command[1:]],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def processes_in(directory: Path) -> list[str]:
    """The command lines of the processes that work there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == directory.resolve():
                found.append((process / "cmdline").read_text())
        except OSError:  # it has ended, or it is another user's
            continue
    return found


def test_a_prediction_writes_its_files_where_the_caller_is(project: Path, tmp_path: Path) -> None:
    done = script(project, "predict", "-i", "prompt=a", "-i", "steps=2", "-i", "fast=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "output.0.webp\n"
    assert (tmp_path / "output.0.webp").read_text() == "2 1 True 'dev'"
    assert "100%|" in done.stderr
    assert processes_in(project) == []


def test_a_file_is_sent_whole_and_taken_from_the_callers_directory(project: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(bytes(range(256)))
    done = script(project, "predict", "-i", "prompt=a", "-i", "image=@photo.jpg", "-o", "new/folder", cwd=tmp_path)
    assert done.stdout == "new/folder/output.0.webp\n"
    assert (tmp_path / "new" / "folder" / "output.0.webp").read_bytes() == bytes(range(256))


@pytest.mark.parametrize("command", [["predict", "-i", "prompt=a", "-i", "steps=2"], ["serve", "--help"]])
def test_a_script_imports_nothing_from_where_it_is_called_and_finds_its_project(
    project: Path, tmp_path: Path, command: list[str]
) -> None:
    for module in ("settings", "request", "json", "local_cog", "predict"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('This is the module of the caller.')")
    (tmp_path / "project").symlink_to(project)
    (tmp_path / "elsewhere" / "project" / "script").mkdir(parents=True)
    # A package of the same name, further behind on Python's path, is not taken for ours either.
    (tmp_path / "packages" / "local_cog").mkdir(parents=True)
    (tmp_path / "packages" / "local_cog" / "__init__.py").touch()
    # With CDPATH, `cd project/script` goes to the other project.
    elsewhere = {"CDPATH": str(tmp_path / "elsewhere"), "PYTHONPATH": str(tmp_path / "packages")}
    done = script(Path("project"), *command, cwd=tmp_path, **elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith({"predict": "output.0.webp\n", "serve": "usage: script/serve"}[command[0]])
    assert not (tmp_path / "elsewhere" / "project" / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["-i", "prompt=fail"], {}, "A mask needs an image."),
        (["-i", "prompt=a"], {"BROKEN": "1"}, "The predictor's setup failed: BROKEN is set; it must not be."),
        (["-i", "prompt=a"], {"UNWELL": "1"}, "The predictor cannot go on: The live weights are not what they were."),
    ],
)
def test_a_failure_is_one_sentence(
    project: Path, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    done = script(project, "predict", *arguments, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr
    assert processes_in(project) == []


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (["prompt"], "-i 'prompt' must have the form key=value or key=@file."),
        (["promt=a"], "There is no input 'promt' (did you mean prompt?); the inputs are prompt, image, steps, "),
        (["zzz=a"], "There is no input 'zzz'; the inputs are prompt, image, steps, "),
        (["prompt=a", "steps=4.5"], "steps is '4.5'; it must be a whole number."),
        (["prompt=a", "steps=@photo.jpg"], "steps is '@photo.jpg'; it must be a whole number."),
        (["prompt=a", "strength=nan"], "strength is 'nan'; it must be a number."),
        (["prompt=a", "fast=yes"], "fast is 'yes'; it must be true or false."),
        (["prompt=a", "image=@nowhere.png"], "image: there is no file 'nowhere.png'."),
        (["prompt=a", "steps=100"], "steps is 100; it must be at most 50."),
        (["prompt=a", "model=def"], "model is 'def' (did you mean dev?); it must be one of dev, schnell."),
        (["steps=4"], 'The input prompt is missing; script/predict -i prompt="a red fox" gives one.'),
    ],
)
def test_wrong_input_is_refused_before_the_server_starts(project: Path, pairs: list[str], sentence: str) -> None:
    done = script(project, "predict", *(word for pair in pairs for word in ("-i", pair)))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("pairs", "inputs"),
    [
        (["prompt=null"], {"prompt": "null"}),
        ([f"{name}=null" for name in ("prompt", "image", "steps", "strength", "fast", "model")], {"prompt": "null"}),
        (["prompt=a", "steps=3", "steps=null"], {"prompt": "a"}),
        (["prompt=a", "steps=null", "steps=3"], {"prompt": "a", "steps": 3}),
    ],
)
def test_null_is_absence_but_in_a_text(pairs: list[str], inputs: dict[str, object]) -> None:
    assert read_inputs(pairs, schema.derive(PREDICTOR)) == inputs


def test_a_file_too_large_for_a_request_is_not_sent(project: Path, tmp_path: Path) -> None:
    with (tmp_path / "lora.safetensors").open("wb") as sparse:
        sparse.truncate(70_000_001)
    done = script(project, "predict", "-i", "prompt=a", "-i", "image=@lora.safetensors", cwd=tmp_path)
    assert done.returncode == 1
    assert "at most 70 MB" in done.stderr
    assert "COG_WEIGHTS=path" in done.stderr
    assert "URL" in done.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="sees processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", [["predict", "-i", "prompt=native"], ["serve"]])
def test_a_stopped_script_leaves_no_process(project: Path, command: list[str], number: signal.Signals) -> None:
    port = str(20000 + os.getpid() % 10000)
    if command[0] == "serve":
        command = [*command, "--port", port]
    process = subprocess.Popen(
        [project / "script" / command[0], *command[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored where the tests run in the background
    )
    shown = ""
    while ("4/4" if command[0] == "predict" else "Server ready") not in shown:
        shown += (more := process.stderr.read(1))
        assert more, shown
    assert processes_in(project) != []
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0 or command[0] == "serve"
    assert processes_in(project) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="sees processes in /proc")
def test_a_killed_server_leaves_neither_process_nor_folder(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "local_cog.server", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while "Server ready" not in process.stderr.readline():
            assert process.poll() is None
        assert list(tmp_path.iterdir()) != []
        process.kill()
    wait_until(lambda: not (processes_in(project) or list(tmp_path.iterdir())), 10)


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        ("127.0.0.1", 65536, "--port is 65536; it must be at most 65535, and not negative."),
        ("127.0.0.1", -1, "--port is -1; it must be at most 65535, and not negative."),
        ("192.0.2.1", 5000, "--host is 192.0.2.1; this machine has no such address."),
        ("2001:db8::1", 5000, "--host is 2001:db8::1; this machine has no such address."),
        ("localhost", 5000, "--host is 'localhost'; it must be an IP address of this machine."),
        ("fe80::1%lo", 5000, "--host is 'fe80::1%lo'; it must be an IP address of this machine."),
        ("", 5000, "--host is ''; it must be an IP address of this machine."),
    ],
)
def test_an_address_at_which_nobody_can_listen_is_refused(host: str, port: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_address(host, port)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_port_that_is_for_root_alone_is_refused() -> None:
    code = "import os; from local_cog.server import check_address; os.setuid(65534); check_address('127.0.0.1', 80)"
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:  # noqa: PTH123
        if int(file.read()) <= 80:
            pytest.skip("here it is for everybody")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ValueError: --port is 80; ports this low are for root alone: take one above 1023."
    )


def test_a_taken_port_is_told_in_a_sentence(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "local_cog.server", "--port", str(port)]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        f"--port is {port}; it must be one that is free at 127.0.0.1: Address already in use.\n",
    )
    assert processes_in(project) == []


def test_a_port_that_is_no_number_is_told_in_a_sentence(project: Path) -> None:
    command = [sys.executable, "-m", "local_cog.server", "--port", "http"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.endswith("argument --port: it is 'http'; it must be a whole number up to 65535.\n")


def test_a_server_says_once_where_it_is_when_it_is_ready(project: Path) -> None:
    command = [sys.executable, "-m", "local_cog.server", "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        said = process.stdout.readline()
        found = re.fullmatch(r"Ready: http://0\.0\.0\.0:(\d+) \(POST /predictions draws, Ctrl-C stops it\)\n", said)
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/health-check", timeout=60) as answered:
            assert json.load(answered)["status"] == "READY"
        process.terminate()
        assert process.stdout.read() == ""


def test_an_ipv6_address_stands_in_brackets_before_its_port() -> None:
    assert (url("::1", 5000), url("127.0.0.1", 80)) == ("http://[::1]:5000", "http://127.0.0.1:80")


def test_a_server_whose_predictor_cannot_be_set_up_ends_with_the_reason(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "local_cog.server", "--port", "0"],
        cwd=project,
        env={**os.environ, "BROKEN": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "The predictor's setup failed: BROKEN is set; it must not be."
    assert processes_in(project) == []


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_a_server_listens_at_an_ipv6_address(project: Path, tmp_path: Path) -> None:
    with CogServer(project, log=tmp_path / "log", host="::1") as server:
        server.wait_until_ready()
        assert files(server.predict({"prompt": "a"})) == [(".webp", b"4 1 False 'dev'")]


def test_a_server_is_stopped_in_the_middle_of_a_prediction(project: Path, tmp_path: Path) -> None:
    with CogServer(project, log=tmp_path / "log") as server:
        server.wait_until_ready()
        assert files(server.predict({"prompt": "a"})) == [(".webp", b"4 1 False 'dev'")]
        assert server.start({"prompt": "slow"}, "one") == {"id": "one", "status": "starting"}
        assert server.cancel("two") == 404
        assert server.cancel("one") == 200
        status, answer = server.request("POST", "/predictions", {"input": {"prompt": "a"}})
        assert (status, failure(answer)) == (409, "At capacity - all prediction slots busy")
        assert failure(server.predict({"prompt": "a"})) is None  # it waits for the slot
        server.start({"prompt": "native", "steps": 1}, "three")
        wait_until(lambda: "1/1" in server.log.read_text())
    assert processes_in(project) == []


def test_a_second_setup_says_nothing_and_takes_no_time(project: Path) -> None:
    script(project, "setup")
    started = time.monotonic()
    done = script(project, "setup", PIP_INDEX_URL="http://127.0.0.1:9/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started < 5


@pytest.fixture
def bare_project(project: Path, tmp_path: Path) -> Path:
    """A fresh clone of a project that requires nothing."""
    bare = tmp_path / "bare"
    shutil.copytree(project, bare, ignore=lambda *_: [".venv", ".cog"])
    for path in bare.glob("requirements*.txt"):
        path.write_text("")
    return bare


@pytest.mark.parametrize("harm", ["unfinished", "bin/python"])
def test_an_interrupted_setup_is_repaired_and_a_python_that_has_gone(bare_project: Path, harm: str) -> None:
    (bare_project / ".venv" / "bin").mkdir(parents=True)
    if harm == "unfinished":
        (bare_project / ".venv" / harm).touch()
    else:
        (bare_project / ".venv" / harm).symlink_to("/nowhere/python3")
        (bare_project / ".venv" / "installed-requirements-dev.txt").touch()
    half = bare_project / ".venv" / "lib" / "python3.11" / "site-packages" / "half"
    half.mkdir(parents=True)
    # Two at once: one installs, the other waits for it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if "site-packages" in path)}
    setups = [
        subprocess.Popen([bare_project / "script" / "setup"], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [setup.communicate(timeout=120)[1] for setup in setups]
    assert [setup.returncode for setup in setups] == [0, 0], said
    assert sorted(map(bool, said)) == [False, True]
    assert not half.exists()
    assert (bare_project / ".cog" / "openapi_schema.json").is_file()


def test_a_machine_without_python_is_told_so(bare_project: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("env", "bash", "dirname", "cat", "cmp", "flock"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = script(bare_project, "setup", PATH=str(tools))
    assert done.returncode == 1
    assert done.stderr == "flux-sprites needs Python 3.11 or newer as python3.11 or python3; there is none on PATH.\n"
    assert not (bare_project / ".venv").exists()


@pytest.mark.parametrize("kernels", ["32768\t60999\n", "1024\t65535\n", None])
def test_a_port_is_free_and_no_connection_of_the_kernels_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str | None
) -> None:
    """As far as the kernel's range leaves room; where it does not, or is not told, any port that is free now."""
    told = tmp_path / "ip_local_port_range"
    if kernels:
        told.write_text(kernels)
    monkeypatch.setattr(local_cog.server, "KERNELS_PORTS", told)
    ports = [local_cog.server.free_port() for _ in range(20)]
    if kernels and kernels.startswith("32768"):
        assert all(local_cog.server.LOWEST_PORT <= port < 32768 for port in ports)

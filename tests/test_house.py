"""Who may import whom, and how large a function or a class may get."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from settings import ROOT
from tests.support.processes import finished

WINGS = ("engine", "lora", "pixels", "sources", "service", "local_cog", "cluster", "playground", "tools")
FURTHER = ("mini", "tests", "bench", "harness")
PAGE = ROOT / "playground" / "page"
# Imports and comments of a module of the page.
NOT_CODE = re.compile(r'^import \{[^}]*\} from "[^"]*";|/\*.*?\*/|(?<!:)//[^\n]*', re.MULTILINE | re.DOTALL)
# Cog reads the inputs from the signature of `predict`, each with its description.
CONTRACT = ("predict.py", "predict")


def files(*folders: str) -> list[Path]:
    return [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the code, with its rules."""
    for file in [ROOT / "tach.toml", *files(*WINGS, *FURTHER)]:
        copied = tmp_path / file.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied)
    return tmp_path


def check(house: Path) -> subprocess.CompletedProcess[str]:
    return finished([Path(sys.prefix) / "bin" / "tach", "check"], cwd=house)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cluster/front.py", "from flux import Flux"),
        ("cluster/dispatcher.py", "from cluster.front import Front"),
        ("cluster/webhooks.py", "from cluster import dispatcher"),
        ("cluster/worker.py", "from engine import live"),
        ("engine/loading.py", "from sources import client"),
        ("flux.py", "from weights import WeightsCache"),
        ("flux.py", "from sources import store"),
        ("images.py", "import flux"),
        ("lora/reader.py", "from engine.live import Live"),
        ("lora_loader.py", "import weights"),
        ("local_cog/server.py", "from cluster import local"),
        ("local_cog/server.py", "from playground import target"),
        ("cluster/playground_page.py", "from playground import events"),
        ("playground/server.py", "from cluster import front"),
        ("predict.py", "from sources.client import Client"),
        ("safety.py", "from mini.training import gallery"),
        ("service/faults.py", "import images"),
        ("sources/store.py", "from sources import references"),
        ("sources/references.py", "if True:\n    from cluster import privacy"),
        ("weights.py", "def later():\n    import flux"),
        ("weights.py", "from tests.support import models"),
        ("flux.py", "from harness import soak"),
        ("tests/test_flux.py", "from bench.gpu import swap"),
        ("bench/gpu/swap.py", "from tests.support import models"),
        ("harness/soak.py", "from tests.support import models"),
        ("predict.py", "from tools import check"),
        ("tools/check.py", "import predict"),
        ("tools/check.py", "from tests.support import models"),
    ],
)
def test_what_the_house_forbids_is_found(house: Path, file: str, line: str) -> None:
    with (house / file).open("a") as opened:
        opened.write(f"\n{line}\n")
    checked = check(house)
    assert checked.returncode != 0
    assert f"{file}:" in checked.stdout + checked.stderr


def test_the_house_keeps_its_rules(house: Path) -> None:
    checked = check(house)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_part_fits_its_room() -> None:
    too_large = [
        f"{file.relative_to(ROOT)}: {node.name} has {size} lines"
        for file in files(*WINGS)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := node.end_lineno - node.lineno + 1) > (250 if isinstance(node, ast.ClassDef) else 60)
        and (str(file.relative_to(ROOT)), node.name) != CONTRACT
    ]
    assert too_large == []


def imported(text: str) -> list[tuple[str, str, str]]:
    """The imports of a module of the page: the file, the name there, and the name here."""
    return [
        (module, original, own or original)
        for names, module in re.findall(r'^import \{([^}]*)\} from "\./([^"]+)"', text, re.MULTILINE)
        for original, own in re.findall(r"([\w$]+)(?: as ([\w$]+))?", names)
    ]


def test_the_page_keeps_to_its_rooms_too() -> None:
    """No function or module of the page is too long; what one exports another imports, and what it imports it uses."""
    modules = {file.name: file.read_text() for file in PAGE.glob("*.js")}
    imports = {name: imported(text) for name, text in modules.items()}
    used = {(module, original) for its in imports.values() for module, original, _ in its}
    faults = [f"{name} has {size} lines" for name, text in modules.items() if (size := text.count("\n")) > 450]
    for name, text in modules.items():
        exports = re.findall(r"^export (?:async )?(?:function|const|class) (\w+)", text, re.MULTILINE)
        faults += [f"{name}: nobody imports {export}" for export in exports if (name, export) not in used]
        words = re.findall(r"[\w$]+", re.sub(NOT_CODE, "", text))
        faults += [f"{name} does not use {own} of {module}" for module, _, own in imports[name] if own not in words]
        functions = re.finditer(r"^(?:export )?(?:async )?function (\w+).*?^\}$", text, re.MULTILINE | re.DOTALL)
        faults += [f"{name}: {it[1]} has {size} lines" for it in functions if (size := it[0].count("\n") + 1) > 60]
    assert faults == []

"""Rules for the source itself: what tests share and replace, and how long a file may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.world import ROOT

PACKAGES = ("pipeline", "kernels", "fused", "benchmarks", "examples", "tests")
SCRIPTS = {path.stem for path in (ROOT / "benchmarks").rglob("*.py")}  # import each other, and are imported, by name
OWN = re.compile(rf"({'|'.join((*PACKAGES, *sorted(SCRIPTS)))})(\.|$)")
PATCHING = ("setattr", "setitem", "delattr", "delitem", "patch", "object", "dict")  # of monkeypatch and unittest.mock
LINES = 320


def imported(tree: ast.Module) -> set[str]:
    """Return the names that a module binds to modules of this repository or to what they define."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name.partition(".")[0] for each in node.names if OWN.match(each.name)}
        elif isinstance(node, ast.ImportFrom) and OWN.match(node.module or ""):
            names |= {each.asname or each.name for each in node.names}
    return names


def root_of(node: ast.expr) -> str:
    """Return the first name of `a.b[c].d`, or the text of a literal; empty for anything else."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else str(node.value) if isinstance(node, ast.Constant) else ""


def patches(source: str) -> Iterator[str]:
    """Yield the statements of a test that replace an attribute or an entry of what this repository defines."""
    tree = ast.parse(source)
    own = imported(tree)

    def is_own(node: ast.expr) -> bool:
        return root_of(node) in own or (isinstance(node, ast.Constant) and bool(OWN.match(str(node.value))))

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else node.targets
            changed = [each for each in targets if isinstance(each, ast.Attribute | ast.Subscript) and is_own(each)]
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else root_of(node.func)
            changed = [node.args[0]] if name in PATCHING and is_own(node.args[0]) else []
        else:
            continue
        if changed:
            yield ast.unparse(node)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_test_file_imports_another():
    """What tests share lies in modules that are no tests."""
    importing = re.compile(r"^(?:from|import) .*\btest_\w+", re.MULTILINE)
    assert [str(file) for file in (ROOT / "tests").rglob("test_*.py") if importing.search(file.read_text())] == []


def test_no_test_replaces_a_name_of_this_repository():
    """A test passes an argument, observes a result, or watches what runs (tests/watching.py)."""
    found = {str(path.relative_to(ROOT)): list(patches(path.read_text())) for path in python_files("tests")}
    assert {name: statements for name, statements in found.items() if statements} == {}


@pytest.mark.parametrize(
    "line",
    [
        "monkeypatch.setattr(training, 'train', spied)",
        "monkeypatch.setattr('pipeline.training.train', spied)",
        "monkeypatch.setattr(training.time, 'sleep', spied)",
        "monkeypatch.setitem(STAGES, 'teacher', spied)",
        "setattr(training, 'train', spied)",
        "mock.patch('pipeline.training.train')",
        "mock.patch.object(training, 'train')",
        "mock.patch.dict(STAGES, {})",
        "training.train = spied",
        "STAGES['teacher'] = spied",
        "broad.SETS = {}",
        "Device.free_memory = spied",
        "del training.train",
    ],
)
def test_a_replaced_name_is_found(line):
    imports = "import broad\nfrom pipeline import training\nfrom pipeline.graph import STAGES\n"
    imports += "from pipeline.runtime.device import Device\nimport time\n"
    assert list(patches(imports + line)) and not list(patches(f"{imports}time.sleep = spied\nown = training.train"))


@pytest.mark.parametrize("folder", ["pipeline", "kernels", "benchmarks", "examples", "tests"])
def test_a_file_has_few_lines(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(folder)}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}

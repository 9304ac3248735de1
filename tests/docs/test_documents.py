"""What documents refer to exists: files, headings, functions; and the short ones are short."""

import ast
import re
from pathlib import Path

import pytest

from tests.world import ROOT

FILES = (
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
)
CODE = r"(?:pipeline|kernels|benchmarks|tests|conf|launch|docker|docs|examples|\.ci)/[\w./-]+"
FUNCTIONS = re.compile(rf"`({CODE}\.py): ([^`]+)`(?:((?:, `[\w.]+`)+))?")
PATHS = re.compile(rf"`({CODE})`")
LINKS = re.compile(r"\]\(([^)\s]+)\)")
HISTORY = ("CHANGELOG.md",)  # speaks of files by their former names too


def references(text: str) -> list[tuple[str, str]]:
    """Return every (file, name) of the references `file: name, name`."""
    found = []
    for file, names, more in FUNCTIONS.findall(re.sub(r"\n +", " ", text)):
        found += [(file, name) for name in re.findall(r"\w[\w.]*", names + more)]
    return found


def defined(file: Path) -> set[str]:
    """Return the names that a module defines: functions, classes, their members, constants."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            name = getattr(member, "name", None) or getattr(getattr(member, "target", None), "id", None)
            names |= {name, f"{node.name}.{name}"} if name else set()
    return names


def anchors(file: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub forms them."""
    text = re.sub(r"(?ms)^```.*?^```", "", file.read_text())
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_function_that_a_document_names_exists(file):
    missing = []
    for path, name in references(file.read_text()):
        if not (ROOT / path).is_file() or name not in defined(ROOT / path):
            missing.append(f"{path}: {name}")
    assert not missing


@pytest.mark.parametrize("file", [each for each in FILES if each.name not in HISTORY], ids=lambda file: file.name)
def test_every_path_that_a_document_names_exists(file):
    paths = [path.rstrip(".") for path in PATHS.findall(file.read_text())]
    made = re.findall(r"(?m)^New file `([^`]+)`", file.read_text())
    missing = [path for path in paths if path not in made and not any(ROOT.glob(path)) and "NAME" not in path]
    assert not missing


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file):
    broken = []
    for link in LINKS.findall(re.sub(r"(?ms)^```.*?^```", "", file.read_text())):
        path, _, anchor = link.partition("#")
        target = file if not path else file.parent / path
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_functions_of_the_methods_are_found_at_all():
    found = references((ROOT / "docs" / "methods.md").read_text())
    assert len(found) > 50 and ("pipeline/prune/surgery/reinit.py", "stabilise_gains") in found
    assert "nowhere" not in defined(ROOT / "pipeline" / "prune" / "surgery" / "reinit.py")


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_results_have_at_most_2500_words():
    text = re.sub(r"<!--.*?-->", "", (ROOT / "docs" / "results.md").read_text())
    assert sum(bool(re.search(r"\w", word)) for word in text.split()) <= 2500

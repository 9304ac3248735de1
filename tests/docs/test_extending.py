"""The examples of docs/extending.md: each is applied to a copy of the checkout, counted, linted and tested."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.world import ROOT, environment

pytestmark = pytest.mark.slow  # examples run the pipeline

PAGE = ROOT / "docs" / "extending.md"
COPIED = ("pipeline", "conf", "kernels", "tests", "pyproject.toml", "README.md")
BLOCK = re.compile(
    r"^(?:(?P<kind>New file) `(?P<new>[^`]+)`"
    r"|(?P<from>From) `(?P<existing>[^`]+)`"
    r"|In `(?P<file>[^`]+)`, (?P<where>after|before|instead of) `(?P<line>[^`]+)`):\n\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def sections() -> dict[str, str]:
    """Return the sections of the page that are changes, by heading."""
    parts = re.split(r"(?m)^## (.+)$", PAGE.read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


SECTIONS = sections()


def apply(text: str, folder: Path) -> list[str]:
    """Make the changes of a section in a copy of the checkout; return the files touched."""
    touched = []
    for block in BLOCK.finditer(text):
        name = block["new"] or block["existing"] or block["file"]
        path = folder / name
        if block["new"]:
            assert not path.exists(), f"{name} exists already"
            path.write_text(block["text"])
        elif block["existing"]:
            assert path.read_text().count(block["text"]) == 1, f"{name} does not contain the lines of the page"
        else:
            source, line = path.read_text(), block["line"] + "\n"
            assert f"\n{source}".count(f"\n{line}") == 1, f"{name} has no single line {block['line']!r}"
            before, _, after = f"\n{source}".partition(f"\n{line}")
            changed = {"after": line + block["text"], "before": block["text"] + line, "instead of": block["text"]}
            path.write_text((f"{before}\n" + changed[block["where"]] + after)[1:])
        touched.append(name)
    return list(dict.fromkeys(touched))


@pytest.fixture
def checkout(tmp_path):
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(folder: Path, *command: str) -> str:
    changed = environment() | {"PYTHONPATH": f"{folder}:{folder / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=changed, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_a_complete_change(name, checkout):
    touched = apply(SECTIONS[name], checkout)
    (stated,) = re.findall(r"(?m)^Files touched: (\d+)\.$", SECTIONS[name])
    assert len(touched) == int(stated)
    run(checkout, "-m", "ruff", "check", *(file for file in touched if file.endswith(".py")))
    tests = [file for file in touched if Path(file).name.startswith("test_")]
    if tests:
        assert " passed" in run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def test_without_its_two_lines_a_family_is_unknown(checkout):
    lines = {block["existing"]: block["text"] for block in BLOCK.finditer(SECTIONS["A family"])}
    (table,) = (file for file in lines if file.startswith("pipeline/"))
    program = "from pipeline.model.families import family_of\nprint(family_of('seed_oss').architecture)"
    assert run(checkout, "-c", program).split() == ["SeedOssForCausalLM"]
    (checkout / table).write_text((checkout / table).read_text().replace(lines[table], ""))
    with pytest.raises(AssertionError, match="seed_oss"):
        run(checkout, "-c", program)


def test_every_code_block_with_a_file_is_applied():
    announced = len(re.findall(r"(?m)^(?:New file|From|In) `[^`]+`", PAGE.read_text()))
    assert announced == sum(len(BLOCK.findall(text)) for text in SECTIONS.values()) > 12
    assert set(SECTIONS) == {
        "A family", "An importance score", "A divergence", "A recipe", "A stage", "A policy",
    }  # fmt: skip

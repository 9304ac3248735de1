"""An installed package, outside any checkout, holds conf/ and answers --help and wrong settings."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.composing import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the package, built from a copy of its sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pipeline", "conf", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    pip = [sys.executable, "-m", "pip", "install", *options, str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def command(installed: Path, *words: str) -> subprocess.CompletedProcess:
    """Run the installed package from an empty folder; PYTHONPATH comes before the environment's own copy."""
    empty = installed / "empty"
    empty.mkdir(exist_ok=True)
    environment = {"PYTHONPATH": str(installed), "PATH": "", "PYTHONIOENCODING": "ascii"}
    code = [sys.executable, "-X", "importtime", "-m", "pipeline", *words]
    return subprocess.run(code, capture_output=True, text=True, cwd=empty, env=environment, timeout=120)


def imported(done: subprocess.CompletedProcess) -> set[str]:
    """Return the top-level modules that a command imported."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def said(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


@pytest.mark.slow
def test_every_package_of_the_tree_is_installed(installed):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py")}
    assert all((installed / folder).is_dir() for folder in folders)
    files = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert files == {path.relative_to(installed / "pipeline" / "conf") for path in installed.rglob("conf/**/*.yaml")}


@pytest.mark.slow
def test_help_comes_from_the_installed_package_without_torch(installed):
    done = command(installed, "--help", "distill")
    assert done.returncode == 0 and "distill.learning_rate=3.0e-4" in done.stdout and said(done) == []
    assert "pipeline" in imported(done) and not {"torch", "transformers", "numpy"} & imported(done)


def test_a_wrong_setting_ends_in_one_line_without_torch(installed):
    for word, name in (("distill.lr=1", "distill.learning_rate"), ("distill.tokens=many", "distill.tokens")):
        done = command(installed, word)
        assert done.returncode == 2 and done.stdout == "" and len(said(done)) == 1 and name in said(done)[0]
        assert not {"torch", "transformers", "numpy"} & imported(done)

"""Folders are layers: every import contract of pyproject.toml is kept."""

import subprocess
import sys

from tests.world import ROOT, environment


def test_the_import_contracts_are_kept():
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ", 0 broken" in ended.stdout

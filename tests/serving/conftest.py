"""Options of the tests of serving, and the file of what they measured."""

import json
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers

from tests.serving import engines
from tests.serving.reference import Agreement


def pytest_addoption(parser):
    parser.addoption("--student", type=Path, help="folder of an exported student, which the engines load as well")
    parser.addoption("--student-name", default="given", help="name of --student in the rows of --record")
    parser.addoption("--record", type=Path, help="JSON file of figures; those of the tests that run are replaced")
    parser.addoption("--machine", default="", help="the machine's description, for --record")


@pytest.fixture
def given_student(request) -> Path:
    folder = request.config.getoption("--student")
    if folder is None:
        pytest.skip("no student; give a folder by --student")
    return folder.resolve()


@pytest.fixture(scope="session")
def record(request) -> Callable[..., None]:
    """Return a function that adds a row of figures to the file of --record."""
    path, given = request.config.getoption("--record"), request.config.getoption("--student-name")

    def add(engine: str, student: str, found: Agreement, **facts: object) -> None:
        if path is None:
            return
        figures = json.loads(path.read_text()) if path.is_file() else {"engines": {}, "rows": []}
        figures["command"] = f"python -m pytest {' '.join(sys.argv[1:])}"
        figures["machine"] = request.config.getoption("--machine") or platform.machine()
        figures["date"] = date.today().isoformat()
        figures["reference"] = {"transformers": transformers.__version__, "torch": torch.__version__}
        figures["converter"] = engines.CONVERTER_PACKAGE.read_text().splitlines()[-1]
        figures["engines"][engine] = {"package": engines.PACKAGES[engine], "version": engines.version(engine)}
        student = re.sub("^given", given, student).replace("-", "_")
        row = {"engine": engine, "student": student, **facts, **asdict(found)}
        rows = [each for each in figures["rows"] if (each["engine"], each["student"]) != (engine, student)]
        figures["rows"] = sorted([*rows, row], key=lambda each: (each["engine"], each["student"]))
        path.write_text(json.dumps(figures, indent=1) + "\n")

    return add

"""Text files are read and written as UTF-8, whatever the locale."""

import ast
from pathlib import Path

import pytest

from tests.composing import ROOT

TEXT = set("rwxat+")


def without_encoding(source: str) -> list[int]:
    """Return the lines of calls that open text without naming an encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or {"encoding", None} & {keyword.arg for keyword in node.keywords}:
            continue
        function, arguments = node.func, node.args
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name == "open":
            if isinstance(function, ast.Attribute) and getattr(function.value, "id", "") in ("os", "store"):
                continue
            rest = arguments if isinstance(function, ast.Attribute) else arguments[1:]
            mode = rest[0].value if rest and isinstance(rest[0], ast.Constant) else "" if rest else "r"
            opens_text = bool(mode) and isinstance(mode, str) and set(mode) <= TEXT
        else:
            opens_text = (name == "read_text" and not arguments) or (name == "write_text" and len(arguments) == 1)
        if opens_text:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda path: path.stem)
def test_text_files_are_opened_as_utf8(path: Path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


def test_a_file_opened_by_the_locale_is_found():
    sources = ("path.read_text()", "path.write_text(text)", "open(path)", "path.open('a')", "open(path, 'w')")
    assert all(without_encoding(source) for source in sources)
    named = ("path.read_text('utf-8')", "path.open('rb')", "open(path, encoding='utf-8')", "os.open(path, os.O_RDONLY)")
    assert not any(without_encoding(source) for source in named)

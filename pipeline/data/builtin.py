"""Texts that every installation carries: builtin:topics, builtin:docstrings, builtin:readmes."""

import ast
import hashlib
import importlib.metadata
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def topics() -> tuple[str, ...]:
    """Return the chapters of Python's language reference that `help()` prints, sorted by name."""
    from pydoc_data.topics import topics as chapters

    return tuple(dict.fromkeys(chapters[name] for name in sorted(chapters)))


@cache
def docstrings() -> tuple[str, ...]:
    """Return a text per module of the standard library, which is parsed and not imported.

    A text is the module's docstrings in source order, none twice in all of them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    known: set[str] = set()
    texts = []
    for file in files:
        if _NOT_THE_LIBRARY.isdisjoint(file.parts):
            fresh = [text for text in dict.fromkeys(_docstrings(root / file)) if text not in known]
            known.update(fresh)
            texts.append("\n\n".join(fresh))
    return tuple(text for text in texts if text)


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # old escapes in other people's literals
        tree = ast.parse(path.read_bytes())
    found = [ast.get_docstring(node) for node in _statements(tree) if isinstance(node, _DOCUMENTED)]
    return list(dict.fromkeys(text for text in found if text))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and the statements within it in source order; expressions document nothing."""
    yield node
    for block in ("body", "cases", "handlers", "orelse", "finalbody"):
        inner = getattr(node, block, ())
        for statement in inner if isinstance(inner, list) else ():
            yield from _statements(statement)


@cache
def readmes() -> tuple[str, ...]:
    """Return the long descriptions of the installed distributions, sorted by name."""
    metadata = {found.metadata["Name"]: found.metadata for found in importlib.metadata.distributions()}
    named = {name.lower(): metadata[name] for name in metadata if name}
    texts = [named[name]["Description"] for name in sorted(named)]
    return tuple(dict.fromkeys(text for text in texts if text and text.strip()))


BUILTINS = {"topics": topics, "docstrings": docstrings, "readmes": readmes}


def version(name: str) -> str:
    """Return what a builtin text changes with: the Python release, or the descriptions themselves for `readmes`."""
    if name == "readmes":
        return hashlib.sha256("\0".join(readmes()).encode()).hexdigest()
    return platform.python_version()

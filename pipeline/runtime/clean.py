"""python -m pipeline clean: show, and on request delete, the artifacts that no run folder refers to."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.artifacts import DAMAGED, PARTIAL
from pipeline.runtime.disk import size
from pipeline.runtime.hashing import files_of
from pipeline.runtime.lock import Lock
from pipeline.runtime.manifest import read_manifest
from pipeline.runtime.run_folder import NAMED, RECORD, artifacts_of

USAGE = "python -m pipeline clean [--yes] [runs=FOLDER ...] [artifacts=FOLDER]"
DAY = 86400


@dataclass(frozen=True)
class Unused:
    """A folder that nothing refers to; `bytes` is what deleting it would free, `age` seconds since it was written."""

    folder: Path
    bytes: int
    age: float


def clean(arguments: list[str]) -> int:
    """Print what is unused and delete it after consent; return the exit code: 0, 1 without consent, 2 for misuse.

    `runs=` may be given several times: all folders that hold runs which use these artifacts.
    """
    runs, root, consent = [], Path("artifacts"), False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "runs" and value:
            runs.append(Path(value))
        elif name == "artifacts" and value:
            root = Path(value)
        elif argument == "--yes":
            consent = True
        elif argument in ("-h", "--help"):
            print(USAGE)
            return 0
        else:
            print(f"error: {argument!r} is not an option; usage: {USAGE}", file=sys.stderr)
            return 2
    try:
        found = unused(runs or [Path("runs")], root)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"{root}: everything is referred to by a run folder; nothing to delete")
        return 0
    print("\n".join(_table(found)))
    if not consent:
        if not sys.stdin.isatty():
            print("add --yes to delete them")
            return 1
        if input("Delete them? [y/N] ").strip().lower() not in ("y", "yes"):
            return 1
    freed = sum(each.bytes for each in found if _delete(each.folder, root))
    for path in (root / PARTIAL).glob("*.lock"):  # of processes that were killed
        lock = Lock(path)
        if lock.try_acquire():
            lock.release()
    print(f"deleted; {size(freed)} freed")
    return 0


def unused(runs: list[Path], root: Path) -> list[Unused]:
    """Return the folders under an artifacts folder that no run folder refers to, the largest first.

    An artifact is referred to by name in run.json, as an input of such an artifact, or through a link inside one. A
    folder with a run.json is a run. Raise ValueError for a missing folder or a damaged run.json, where that is not
    known.
    """
    for name, folder in [*(("runs", folder) for folder in runs), ("artifacts", root)]:
        if not folder.is_dir():
            raise ValueError(f"{name}: {folder} is not a folder; name the folder with {name}=FOLDER")
    records = [path for folder in runs for path in folder.rglob(RECORD)]
    used = _with_inputs({name for path in records for name in artifacts_of(path.parent)}, root)
    folders = [path for path in root.iterdir() if path.is_dir() and NAMED.fullmatch(path.name)]
    folders += [path for path in _inside(root / PARTIAL) if path.is_dir()]
    folders = [path for path in folders if path.name not in used and not (path / RECORD).exists()]
    folders += _inside(root / DAMAGED)
    return sorted(map(_measured, folders), key=lambda each: (-each.bytes, each.folder))


def _with_inputs(names: set[str], root: Path) -> set[str]:
    """Return artifacts with those that they were made from, and those that their links lead to."""
    used, left, home = set(), list(names), root.resolve()
    while left:
        name = left.pop()
        if name in used:
            continue
        used.add(name)
        folder = root / name
        if not folder.is_dir():
            continue
        with suppress(ValueError):  # damaged: it will be made again from inputs that its run names
            left += read_manifest(folder).facts["inputs"].values()
        targets = (path.resolve() for _, path in files_of(folder) if path.is_symlink())
        left += [target.relative_to(home).parts[0] for target in targets if target.is_relative_to(home)]
    return used


def _delete(folder: Path, root: Path) -> bool:
    """Delete a folder; return False for a partial one that a process is working on."""
    if folder.parent != root / PARTIAL:
        shutil.rmtree(folder)
        return True
    lock = Lock(folder.with_name(f"{folder.name}.lock"))
    if not lock.try_acquire():
        print(f"{folder} is in use and stays")
        return False
    try:
        shutil.rmtree(folder)
    finally:
        lock.release()
    return True


def _measured(folder: Path) -> Unused:
    total = 0
    for place, _, names in os.walk(folder):
        facts = [os.lstat(os.path.join(place, name)) for name in names]
        total += sum(each.st_size for each in facts if each.st_nlink == 1)  # a delivered student keeps its own
    return Unused(folder, total, time.time() - folder.stat().st_mtime)


def _inside(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _table(found: list[Unused]) -> Iterator[str]:
    for each in found:
        yield f"{size(each.bytes):>10}  {max(0.0, each.age) / DAY:6.1f} days  {each.folder}"
    yield f"{size(sum(each.bytes for each in found)):>10}  in {len(found)} folders that no run folder refers to"

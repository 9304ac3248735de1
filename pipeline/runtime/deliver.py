"""Delivering: what a run made for people, as real files that outlive the artifacts, replaced in one step.

Files of 1 MiB and more are hard links to the artifact's where the disk allows it, so weights take no room twice.
Smaller ones are copies, so that editing a delivered config.json leaves the artifact alone. Weights that are edited in
place change the artifact too: the next run detects that by their digest and makes the artifact again.
"""

import ctypes
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.runtime.hashing import digest, file_digest, files_of
from pipeline.runtime.log import say
from pipeline.runtime.manifest import CONTENT, MANIFEST, read_manifest
from pipeline.runtime.records import temporary

LARGE = 1 << 20  # bytes of a file from which on it is a hard link
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def contents_of(artifact: Path, inside: str) -> dict[str, str]:
    """Return name -> digest of the files at a path inside an artifact, as its manifest records them."""
    files = read_manifest(artifact).files
    if inside in files:
        return {Path(inside).name: files[inside][CONTENT]}
    start = f"{inside}/" if inside else ""
    return {name.removeprefix(start): facts[CONTENT] for name, facts in files.items() if name.startswith(start)}


def mark(contents: Mapping[str, str]) -> str:
    """Return a short digest of a folder's file names and contents, without the name of a single file."""
    return digest(sorted(contents.values()) if len(contents) == 1 else sorted(contents.items()))


def mark_at(path: Path) -> str | None:
    """Return the mark of a delivered file or folder as it is on the disk now; None where there is none."""
    if path.is_symlink() or not path.exists():
        return None
    return mark({name: file_digest(file) for name, file in files_of(path) if name != MANIFEST})


def deliver(source: Path, target: Path, known: list[str], added: Mapping[str, Path] | None = None) -> None:
    """Put a copy of the file or folder `source` at `target`, which is whole at every moment.

    `added`: name -> a file of another origin that the copy of a folder gets as well, in place of one of that name.

    What was there is removed if it is a link or as it was delivered, its mark being one of `known`. Anything else is
    kept beside it under another name, and a line says so.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*"):  # of an attempt that was killed
        _remove(stale)
    fresh = temporary(target)
    _copy(source, fresh)
    for name, path in (added or {}).items():
        (fresh / name).unlink(missing_ok=True)  # may be a hard link
        shutil.copyfile(path, fresh / name)
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        fresh.rename(target)
        return
    _exchange(fresh, target)
    if fresh.is_symlink() or mark_at(fresh) in known:
        _remove(fresh)
        return
    aside = _free_name(target)
    fresh.rename(aside)
    say(f"{target} held files of another origin, or changed ones; they are in {aside} now", 0)


def _copy(source: Path, fresh: Path) -> None:
    for name, path in files_of(source):
        if name == MANIFEST:
            continue
        goal = fresh / name if source.is_dir() else fresh
        goal.parent.mkdir(parents=True, exist_ok=True)
        if not (path.stat().st_size >= LARGE and _linked(path.resolve(), goal)):
            shutil.copyfile(path, goal)
            with goal.open("rb") as file:
                os.fsync(file.fileno())


def _linked(path: Path, goal: Path) -> bool:
    """Return whether the disk could link the file: not across disks, and not every file system has hard links."""
    try:
        os.link(path, goal)
    except OSError:
        return False
    return True


def _exchange(fresh: Path, target: Path) -> None:
    """Exchange two paths, in one step where the kernel can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or rename(HERE, os.fsencode(fresh), HERE, os.fsencode(target), EXCHANGE) != 0:
        old = fresh.with_name(f"{fresh.name}.old")
        target.rename(old)
        fresh.rename(target)
        old.rename(fresh)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _free_name(target: Path) -> Path:
    number = 1
    while os.path.lexists(target.with_name(f"{target.stem}-{number}{target.suffix}")):
        number += 1
    return target.with_name(f"{target.stem}-{number}{target.suffix}")

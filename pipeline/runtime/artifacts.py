"""Artifacts: the folders finished stages leave behind, named by the digest of all that determined them.

A stage fills `<root>/.partial/<stage>-<digest>/`, which survives a crash, under a lock that keeps other processes out;
the finished folder gets a manifest.json and appears as `<root>/<stage>-<digest>/` by one rename: there it is whole.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.runtime.lock import Lock
from pipeline.runtime.log import say
from pipeline.runtime.ranks import PeerFailed, Ranks

MANIFEST = "manifest.json"
CLOCK = ".clock.json"
LIBRARIES = ("torch", "torch_npu", "transformers", "deepspeed", "safetensors", "tokenizers", "datasets", "numpy")
MIB = 1 << 20
WHOLE = 64 * MIB   # files up to this size are read whole by `fingerprint`
SAMPLES = 64       # blocks of 64 KiB read from the inside of larger ones


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the value's canonical JSON; ValueError where JSON cannot hold it."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as fault:
        raise ValueError(f"a setting is no JSON value ({fault}); give numbers, strings, lists and mappings") from None
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(folder: Path) -> str:
    """A cheap digest of a model folder or file: names, sizes, the bytes of small files, blocks of large ones.

    Of a file above 64 MiB the first and last MiB are read, and 64 blocks of 64 KiB between. An edit that
    keeps such a file's size and misses every block read is not seen.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; give a folder with a model")
    hasher = hashlib.sha256()
    for name, path in _files(folder):
        size = path.stat().st_size
        hasher.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start, length in _blocks(size):
                file.seek(start)
                hasher.update(file.read(length))
    return hasher.hexdigest()[:12]


def code_revision() -> str:
    """The git revision of this code, `-dirty` where files differ from it; the package's version outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if (here / ".git").exists() and shutil.which("git"):
        revision = _git(here, "rev-parse", "HEAD")
        if revision:
            return revision + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    return library_versions(("pangu-light",)).get("pangu-light", "unknown")


def library_versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """The installed version of each library that is installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class Store:
    """The artifacts under `root`. Every rank calls every method in the same order; rank 0 alone writes."""

    root: Path
    ranks: Ranks
    revision: str  # of the code, written into manifests
    device: str = ""  # the chip's own name, written into manifests

    def path(self, stage: str, key: str) -> Path:
        return Path(self.root) / f"{stage}-{key}"

    def find(self, stage: str, key: str) -> Path | None:
        """The finished artifact, or None; one whose files do not match its manifest is reported and not used."""
        folder = self.path(stage, key)
        return folder if self._on_first_rank(lambda: self._usable(folder)) else None

    @contextmanager
    def open(self, stage: str, key: str, keep: bool = True) -> Iterator[Path | None]:
        """Give the folder to fill, with what a crashed attempt left in it where `keep` is true.

        None where another process, waited for here however long it works, has published the artifact meanwhile.
        """
        partial = Path(self.root) / ".partial" / f"{stage}-{key}"
        lock = Lock(partial.with_name(partial.name + ".lock"))

        def begin() -> bool:
            lock.acquire(lambda owner: say(f"{stage}: {owner} is making {partial.name}; waiting for it", 0))
            if self._usable(self.path(stage, key)):
                return False
            if not keep and partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True, exist_ok=True)
            if keep:
                _start_clock(partial)
            return True

        try:
            mine = self._on_first_rank(begin)
            if mine:
                self._seen(partial)
                self.ranks.wait(f"{stage} opened")  # before rank 0 begins, and maybe makes the folder anew
            yield partial if mine else None
        finally:
            lock.release()

    def publish(
        self, stage: str, key: str, settings: dict, inputs: Mapping[str, str], seconds: float, peak_memory: int
    ) -> Path:
        """Write the manifest of the filled folder and rename it into place.

        `inputs`: the folder name of each artifact read; `seconds`: how long this attempt took, to which those that it
        went on from are added; `peak_memory`: bytes.
        """
        folder = self.path(stage, key)
        partial = Path(self.root) / ".partial" / folder.name
        facts = {
            "stage": stage,
            "digest": key,
            "settings": settings,
            "inputs": dict(inputs),
            "revision": self.revision,
            "libraries": library_versions(),
            "device": self.device,
            "seconds": seconds,
            "peak_memory": peak_memory,
        }
        self.ranks.wait(f"{stage} filled")
        self._on_first_rank(lambda: _publish(partial, folder, facts))
        return self._seen(folder)

    def _usable(self, folder: Path) -> bool:
        if not folder.exists():
            return False
        fault = damage(folder)
        if fault:
            say(f"{folder} is damaged and not used: {fault}", 0)
        return fault is None

    def _on_first_rank(self, step: Callable[[], Any]) -> Any:
        """Run the step on rank 0 and give its answer, or its error, to every rank."""
        answer: dict[str, Any] = {}
        if self.ranks.rank == 0:
            try:
                answer = {"value": step()}
            except (OSError, ValueError) as fault:
                self.ranks.share({"fault": f"{type(fault).__name__}: {fault}"})
                raise
        answer = self.ranks.share(answer)
        if "fault" in answer:
            raise PeerFailed(f"rank 0 failed: {answer['fault']}")
        return answer["value"]

    def _seen(self, folder: Path) -> Path:
        if not folder.exists():
            raise RuntimeError(
                f"rank {self.ranks.rank} on {socket.gethostname()} does not see {folder}, which rank 0 made;"
                " set artifacts to a folder that all nodes share"
            )
        return folder


def damage(folder: Path) -> str | None:
    """What is wrong with a published folder, by its manifest and its files' sizes, in one line; None if nothing is."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"it has no {MANIFEST}"
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError) as fault:
        return f"its {MANIFEST} cannot be read ({fault})"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file by one rename: a reader sees the old text or the new, whole."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _publish(partial: Path, folder: Path, facts: dict) -> None:
    facts = facts | {"seconds": facts["seconds"] + _earlier(partial)}
    files = {name: _seal(path) for name, path in _files(partial) if name != MANIFEST}
    if not files:
        raise ValueError(f"{partial} is empty: stage {facts['stage']} made nothing")
    write_atomically(partial / MANIFEST, json.dumps({**facts, "files": files}, indent=2, sort_keys=True) + "\n")
    for inner in {path.parent for _, path in _files(partial)} | {partial}:
        _sync(inner)
    if folder.exists():  # damaged, or it would have been used: kept aside for whoever wants to know why
        aside = folder.parent / ".damaged" / f"{folder.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        say(f"the damaged {folder.name} is now {aside}", 0)
    (partial / CLOCK).unlink(missing_ok=True)
    partial.rename(folder)
    _sync(folder.parent)


def _start_clock(partial: Path) -> None:
    """Note when an attempt begins, and how long those before it took, each until the last file that it wrote."""
    spent = 0.0
    if (partial / CLOCK).is_file():
        began = json.loads((partial / CLOCK).read_text())["began"]
        last = max((path.stat().st_mtime for _, path in _files(partial)), default=began)
        spent = _earlier(partial) + max(0.0, last - began)
    write_atomically(partial / CLOCK, json.dumps({"began": time.time(), "earlier": spent}))


def _earlier(partial: Path) -> float:
    """Seconds that the attempts before this one took; 0 where a stage cleared the folder and began anew."""
    clock = partial / CLOCK
    return json.loads(clock.read_text())["earlier"] if clock.is_file() else 0.0


def _seal(path: Path) -> dict:
    """Size and SHA-256 of a file, after its bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files under a folder with their names inside it, sorted; hidden ones are left out. A file gives itself."""
    if folder.is_file():
        yield folder.name, folder
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE:
        yield 0, size
        return
    yield 0, MIB
    for sample in range(1, SAMPLES + 1):
        yield size * sample // (SAMPLES + 1), MIB // 16
    yield size - MIB, MIB


def _git(folder: Path, *arguments: str) -> str:
    answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip()

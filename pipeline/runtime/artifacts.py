"""Artifacts: the folders finished stages leave behind, named by the digest of all that determined them.

A stage fills `<root>/.partial/<stage>-<digest>/`, which survives a crash, under a lock that keeps other processes out.
The finished folder gets a manifest.json and appears as `<root>/<stage>-<digest>/` by one rename, so it is complete.
Before an artifact is used its files are compared with the manifest.
"""

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

from pipeline.runtime.hashing import files_of
from pipeline.runtime.lock import Lock
from pipeline.runtime.log import say
from pipeline.runtime.manifest import MANIFEST, Manifest, damage, sealed
from pipeline.runtime.ranks import PeerFailed, Ranks
from pipeline.runtime.records import is_temporary, load_record, save_record, write_atomically

CLOCK = ".clock.json"
PARTIAL, DAMAGED = ".partial", ".damaged"  # folders under the root: interrupted stages, artifacts that failed a check
LIBRARIES = ("torch", "torch_npu", "transformers", "deepspeed", "safetensors", "tokenizers", "datasets", "numpy")


def code_revision() -> str:
    """Return the git revision of this code, with `-dirty` where files differ from it.

    Outside a checkout, return the package's version.
    """
    here = Path(__file__).resolve().parents[2]
    if (here / ".git").exists() and shutil.which("git"):
        revision = _git(here, "rev-parse", "HEAD")
        if revision:
            return revision + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    return library_versions(("pangu-light",)).get("pangu-light", "unknown")


def library_versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Return the version of each of the libraries that is installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class Store:
    """The artifacts under `root`. Every rank calls every method in the same order; only rank 0 reads and writes files.

    `verify` says how an artifact is compared with its manifest before use: `full` (names, sizes and the digests of all
    bytes) or `size` (names and sizes).
    """

    root: Path
    ranks: Ranks
    revision: str  # of the code, written into manifests
    device: str = ""  # the chip's own name, written into manifests
    verify: str = "full"

    def path(self, stage: str, key: str) -> Path:
        return Path(self.root) / f"{stage}-{key}"

    def find(self, stage: str, key: str) -> Path | None:
        """Return the finished artifact, or None; one that does not match its manifest is reported and not used."""
        folder = self.path(stage, key)

        def check() -> bool:
            fault = self._damage(folder)
            if fault and folder.exists():
                say(f"{folder} is damaged and not used: {fault}", 0)
            return fault is None

        return folder if self._on_first_rank(check) else None

    @contextmanager
    def open(self, stage: str, key: str, keep: bool = True) -> Iterator[Path | None]:
        """Yield the folder to fill, with what an interrupted attempt left in it where `keep` is true.

        Yield None where another process has published the artifact meanwhile; its work is waited for without limit.
        """
        partial = Path(self.root) / PARTIAL / f"{stage}-{key}"
        lock = Lock(partial.with_name(partial.name + ".lock"))

        def begin() -> bool:
            lock.acquire(lambda owner: say(f"{stage}: {owner} is making {partial.name}; waiting for it", 0))
            if self._damage(self.path(stage, key)) is None:
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
                self._visible(partial)
                self.ranks.wait(f"{stage} opened")  # before rank 0 begins, and maybe makes the folder again
            yield partial if mine else None
        finally:
            lock.release()

    def publish(
        self, stage: str, key: str, settings: dict, inputs: Mapping[str, str], seconds: float, peak_memory: int
    ) -> Path:
        """Write the manifest of the filled folder and rename it into place; return the artifact's folder.

        `inputs`: the folder name of each artifact read; `seconds`: how long this attempt took, to which the time of the
        interrupted attempts before it is added; `peak_memory`: bytes.
        """
        folder = self.path(stage, key)
        partial = Path(self.root) / PARTIAL / folder.name
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
        return self._visible(folder)

    def _damage(self, folder: Path) -> str | None:
        return damage(folder, content=self.verify == "full")

    def _on_first_rank(self, step: Callable[[], Any]) -> Any:
        """Run the step on rank 0 and return its result, or raise its error, on every rank."""
        answer: dict[str, Any] = {}
        if self.ranks.rank == 0:
            try:
                answer = {"value": step()}
            except (OSError, ValueError) as error:
                self.ranks.share({"error": f"{type(error).__name__}: {error}"})
                raise
        answer = self.ranks.share(answer)
        if "error" in answer:
            raise PeerFailed(f"rank 0 failed: {answer['error']}")
        return answer["value"]

    def _visible(self, folder: Path) -> Path:
        if not folder.exists():
            raise RuntimeError(
                f"rank {self.ranks.rank} on {socket.gethostname()} does not see {folder}, which rank 0 made;"
                " set artifacts to a folder that all nodes share"
            )
        return folder


def _publish(partial: Path, folder: Path, facts: dict) -> None:
    facts = facts | {"seconds": facts["seconds"] + _clock(partial)["earlier"]}
    for path in filter(is_temporary, partial.rglob(".*")):  # of an attempt that was killed
        path.unlink()
    files = {name: sealed(path) for name, path in files_of(partial) if name != MANIFEST}
    if not files:
        raise ValueError(f"{partial} is empty: stage {facts['stage']} made nothing")
    write_atomically(partial / MANIFEST, Manifest(facts, files).text())
    for inner in {path.parent for _, path in files_of(partial)} | {partial}:
        _sync(inner)
    if folder.exists():  # damaged, or it would have been used: kept aside for whoever wants to know why
        aside = folder.parent / DAMAGED / f"{folder.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        say(f"the damaged {folder.name} was moved to {aside}", 0)
    (partial / CLOCK).unlink(missing_ok=True)
    partial.rename(folder)
    _sync(folder.parent)


def _start_clock(partial: Path) -> None:
    """Note when an attempt begins and how long those before it took, each until the last file that it wrote."""
    clock = _clock(partial)
    last = max((path.stat().st_mtime for _, path in files_of(partial)), default=clock["began"])
    spent = max(0.0, last - clock["began"]) if clock["began"] else 0.0
    save_record(partial / CLOCK, {"began": time.time(), "earlier": clock["earlier"] + spent})


def _clock(partial: Path) -> dict[str, float]:
    """Return when this attempt began and the seconds of those before it; zeros where the folder was cleared."""
    return {"began": 0.0, "earlier": 0.0} | load_record(partial / CLOCK, {})


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _git(folder: Path, *arguments: str) -> str:
    answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip()

"""The run folder runs/<name>/: run.json, the student and report as real files, and links to the other artifacts."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime import disk
from pipeline.runtime.deliver import contents_of, deliver, mark, mark_at
from pipeline.runtime.lock import Lock
from pipeline.runtime.log import say
from pipeline.runtime.records import is_temporary, read_record, record_text, temporary, write_atomically

RECORD = "run.json"
NAMED = re.compile(r"[a-z_]+-[0-9a-f]{12}")  # an artifact's folder: its stage, its digest


@dataclass(frozen=True)
class Shown:
    """Something a run folder shows: the path `inside` an artifact; a real copy where it is `delivered`, else a link."""

    artifact: Path
    inside: str
    delivered: bool = False

    @property
    def path(self) -> Path:
        return self.artifact / self.inside


def show(runs: Path, name: str, record: dict[str, Any], shown: Mapping[str, Shown], output: Path | None = None) -> Path:
    """Bring runs/<name>/ up to date and return it: run.json, links and delivered files, each put in place in one step.

    A link to an artifact that `record["stages"]` does not name is removed, also in rounds/N/; files are not. Delivered
    files of an earlier run stay until those of this one are complete. With `output` the student is delivered there and
    the run folder has a link to it. A label STUDENT/FILE adds a file to what is delivered as STUDENT.
    """
    view = Path(runs) / name
    with _locked(view):
        _remove_links(view, record)
        delivered = _deliver(view, record, {label: each for label, each in shown.items() if each.delivered}, output)
        _write(view, record, delivered)
        for label, each in shown.items():
            if not each.delivered:
                _link(view, label, each.path.resolve())
    return view


def write_record(view: Path, record: dict[str, Any]) -> None:
    """Write run.json alone."""
    with _locked(view):
        _write(view, record, _record_of(view))


def artifacts_of(view: Path) -> set[str]:
    """Return the names of the artifacts that a run folder's run.json refers to; none where it is missing.

    Raise ValueError where it is damaged.
    """
    path = view / RECORD
    if not path.is_file():
        return set()
    try:
        record = read_record(path)
    except ValueError as error:
        raise ValueError(f"{view}: {error}; remove it, or run the command of this run again") from None
    parts = (*record["stages"].values(), *record.get("delivered", {}).values())
    return {each["artifact"] for each in parts}.union(record.get("unfinished", ()), record.get("earlier", ()))


def check_places(runs: Path, name: str, artifacts: Path, output: str | None) -> None:
    """Raise ValueError for folders that cannot be written to or that hold each other, before any work."""
    view = runs / name
    for part in (view, *view.parents[: len(Path(name).parts) - 1]):
        if part.is_symlink() or (part != view and (part / RECORD).exists()):
            what = "a link" if part.is_symlink() else "a run"
            raise ValueError(f"run: {name} lies in {part}, which is {what}; choose another name")
    places = {"artifacts": artifacts, "runs": runs}
    for setting, folder in places.items():
        try:
            disk.probe(folder)
        except OSError as error:
            reason = f"{error.strerror}; choose a folder where files can be locked"
            raise ValueError(f"{setting}: {folder}: {reason}") from None
    if output is None:
        return
    place = Path(output)
    for what, folder in (*places.items(), ("the run folder", view)):
        if folder.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"output: {place} holds {what} ({folder}); name a folder of its own")
    if place.resolve().is_relative_to(artifacts.resolve()) or place.resolve() == (view / "student").resolve():
        raise ValueError(f"output: {place} is where the pipeline keeps its own files; name another folder, or none")
    check_output(runs, name, place)
    try:
        disk.probe(place.absolute().parent)  # the folder itself is put in place as a whole
    except OSError as error:
        raise ValueError(f"output: {place}: {error.strerror}; choose a folder that can be written") from None


def check_output(runs: Path, name: str, output: Path) -> None:
    """Raise ValueError where the student cannot be put into `output` without losing files of another origin."""
    if os.path.ismount(output):
        raise ValueError(f"output: {output} is a mount point, which cannot be replaced; name a folder inside it")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    known = _record_of(Path(runs) / name).get("student", {}).get("marks", [])
    if mark_at(output) not in known:
        raise ValueError(f"output: {output} holds files that run {name} did not put there; name a new or empty folder")


def is_as_delivered(view: Path, label: str) -> bool:
    """Return whether a file or folder is what run.json says was delivered; True where that says nothing of it.

    Raise ValueError where run.json is damaged.
    """
    if not (view / RECORD).is_file():
        return True
    delivered = read_record(view / RECORD).get("delivered", {})
    return label not in delivered or mark_at(view / label) in delivered[label]["marks"]


@contextmanager
def _locked(view: Path) -> Iterator[None]:
    """Keep other processes out of a run folder, made now if need be, and remove what killed ones left there."""
    view.mkdir(parents=True, exist_ok=True)
    lock = Lock(view / ".lock")
    lock.acquire(lambda owner: say(f"{view}: {owner} is writing it; waiting", 0))
    try:
        for path in view.iterdir():
            if is_temporary(path) and (path.is_symlink() or path.is_file()):
                path.unlink()
        yield
    finally:
        lock.release()


def _deliver(view: Path, record: dict, files: Mapping[str, Shown], output: Path | None) -> dict[str, Any]:
    """Deliver what is not there yet; return artifact and marks of everything delivered to this run folder.

    The marks are written down before a file is replaced and reduced to one afterwards, so that what a killed process
    left is recognised.
    """
    delivered = _record_of(view)
    added = {label: _added(label, files) for label in files}
    files = {label: each for label, each in files.items() if "/" not in label}
    wanted = {label: mark(_contents(each, added[label])) for label, each in files.items()}
    places = {label: output if output and label == "student" else view / label for label in files}
    late = [label for label in files if mark_at(places[label]) != wanted[label]]
    for label, each in files.items():
        earlier = delivered.get(label, {}).get("marks", [])
        delivered[label] = {"artifact": each.artifact.name, "marks": list(dict.fromkeys([wanted[label], *earlier]))}
    if late:
        _write(view, record, delivered)
    for label in late:
        more = {name: each.path for name, each in added[label].items()}
        deliver(files[label].path, places[label], delivered[label]["marks"], more)
    for label in files:
        delivered[label]["marks"] = [wanted[label]]
        if places[label] != view / label:
            _link(view, label, places[label].resolve())
    return delivered


def _added(label: str, files: Mapping[str, Shown]) -> dict[str, Shown]:
    """Return the files that other artifacts add to the folder of a label, by name."""
    return {name.removeprefix(f"{label}/"): each for name, each in files.items() if name.startswith(f"{label}/")}


def _contents(each: Shown, added: Mapping[str, Shown]) -> dict[str, str]:
    """Return name -> digest of what is delivered."""
    contents = contents_of(each.artifact, each.inside)
    for name, other in added.items():
        (contents[name],) = contents_of(other.artifact, other.inside).values()
    return contents


def _record_of(view: Path) -> dict[str, Any]:
    """Return what run.json says was delivered; nothing where it is missing or damaged."""
    try:
        return read_record(view / RECORD).get("delivered", {})
    except ValueError:
        return {}


def _write(view: Path, record: dict, delivered: dict) -> None:
    write_atomically(view / RECORD, record_text(record | {"delivered": delivered}))


def _remove_links(view: Path, record: dict) -> None:
    named = {stage["artifact"] for stage in record["stages"].values()}
    for path in (*view.iterdir(), *view.glob("rounds/*/*")):
        parts = path.readlink().parts if path.is_symlink() else ()
        if named.isdisjoint(parts) and any(map(NAMED.fullmatch, parts)):
            path.unlink()


def _link(view: Path, label: str, target: Path) -> None:
    link = view / label
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link} is in the way of a link to {target}; move it or choose another run name")
    fresh = temporary(link)
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, view.resolve()))
    os.replace(fresh, link)

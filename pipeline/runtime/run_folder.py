"""The human view of a run: runs/<name>/, links to the artifacts it made or found."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.runtime.artifacts import write_atomically

NAMED = re.compile(r"[a-z]+-[0-9a-f]{12}")  # an artifact's folder: its stage, its digest


def show(runs: Path, name: str, record: dict, artifacts: Mapping[str, Path]) -> Path:
    """Write the human view runs/<name>/: run.json and one link an artifact, each put in place by one rename.

    What stands there is of one run: a link to an artifact that `record["stages"]` does not name is taken away, also in
    rounds/N/. Only links to artifacts are, no file is.
    """
    view = Path(runs) / name
    view.mkdir(parents=True, exist_ok=True)
    named = {stage["artifact"] for stage in record["stages"].values()}
    for path in (*view.iterdir(), *view.glob("rounds/*/*")):
        parts = path.readlink().parts if path.is_symlink() else ()
        if named.isdisjoint(parts) and any(map(NAMED.fullmatch, parts)):
            path.unlink()
    write_atomically(view / "run.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
    for label, target in artifacts.items():
        link = view / label
        if link.exists() and not link.is_symlink():
            raise ValueError(f"{link} is in the way of a link to {target}; move it or choose another run name")
        fresh = view / f".{label}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(target.resolve(), view.resolve()))
        os.replace(fresh, link)
    return view

"""What ablations share: rows are runs of the pipeline, <prefix>-<row>-<seed>; a table shows those with a report."""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arguments import at_least, described, several, some_of

RESULTS = Path(__file__).resolve().parent / "results"
Report = dict[str, Any]


def parser(document: str, rows: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Return the parser of the options that all ablations have; what it does not know are settings of the pipeline."""
    parser = described(document)
    parser.add_argument("--seeds", default="0", type=several(at_least(0)))
    parser.add_argument("--rows", default=list(rows), type=some_of(rows))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table and its figures go")
    return parser


def unseen(texts: Path, settings: Sequence[str]) -> list[str]:
    """Return the setting of the texts that rows are measured on, none where the command has its own.

    SystemExit where the folder lacks the one that no installation has: no row could be measured.
    """
    if any(setting.startswith("data.evaluation.path=") for setting in settings):
        return []
    jargon = texts / "jargon.txt"
    if not jargon.is_file():
        sys.exit(f"error: --texts: {texts} has no jargon.txt; benchmarks/quality/texts.py writes it")
    return [f"data.evaluation.path=[builtin:readmes,{jargon},builtin:topics]"]


def run_rows(
    prefix: str, rows: Mapping[str, Sequence[str]], options: argparse.Namespace, write: Callable[[], None]
) -> None:
    """Run the requested rows, one at a time, by their settings; write the table after each.

    A row that fails does not stop the others; their names are printed at the end, and the exit status is 1.
    """
    failed = []
    for seed in options.seeds:
        for row in options.rows:
            name = f"{prefix}-{row}-{seed}"
            print(f"== {name}", flush=True)
            command = [
                sys.executable,
                "-m",
                "pipeline",
                *rows[row],
                f"run={name}",
                f"runs={options.runs}",
                f"seed={seed}",
            ]
            if subprocess.run(command).returncode:
                failed.append(name)
            else:
                write()
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}")


def reports(prefix: str, rows: Mapping[str, Any], runs: Path) -> dict[tuple[str, int], Report]:
    """Return the report of every run that has one, by row and seed, rows in their order."""
    found = {}
    for row in rows:
        paths = {int(path.parent.name.rpartition("-")[2]): path for path in runs.glob(f"{prefix}-{row}-*/report.json")}
        found |= {(row, seed): json.loads(path.read_text()) for seed, path in sorted(paths.items())}
    return found


def write_table(place: Path, title: str, caption: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Write `place` as Markdown: how it was made, a caption, and a table."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    made = f"`{command}`, {os.cpu_count()} CPU cores, {datetime.date.today()}. {caption}"
    table = [columns, ["---"] * len(columns), *lines]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("\n".join([f"# {title}", "", made, "", *(f"| {' | '.join(line)} |" for line in table)]) + "\n")

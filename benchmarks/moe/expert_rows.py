"""Fewer experts by REAP, by frequency and at random, before and after a short recovery, side by side.

    python benchmarks/moe/expert_rows.py MODEL [--keep 6,4] [--choices reap,frequency,random] [--runs runs/moe]
        [--results FOLDER] [settings of the pipeline ...]

MODEL is a mixture, as upcycle.py makes one. A row is one run; one that is finished is not run again, and stages of
equal settings are shared. Printed are perplexities over those of the model itself, by text; experts.md and its figures
experts.json go to --results.
"""

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the directory of arguments.py

from arguments import at_least, described, folder_with, several, some_of
from composing import with_settings

CHOICES = {
    "reap": ["score.experts=reap"],
    "frequency": ["score.experts=frequency"],
    "random": ["plan.experts=random"],
}
COMMON = [
    "data.sequence_length=256",
    "data.evaluation.path=[builtin:topics,builtin:readmes]",
    "calibration.batch_size=4",
    "score.tokens=2048",
    "distill.tokens=4096",
    "distill.global_batch_size=2",
    "distill.micro_batch_size=2",
    "distill.eval_tokens=1024",
    "distill.eval_steps=1000",
    "distill.save_steps=1000",
    "distill.select=last",
    "evaluate.tokens=2048",
    "evaluate.words=0",
    "evaluate.speed=false",
    "report.samples=0",
    "track.mode=disabled",
]
STATES = {"start": "before", "student": "after"}
Row = tuple[int, str]


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("model", type=folder_with("config.json"))
    parser.add_argument("--keep", type=several(at_least(1)), default="6,4", help="experts of a layer, by commas")
    parser.add_argument("--choices", type=some_of(CHOICES), default=",".join(CHOICES))
    parser.add_argument("--runs", type=Path, default=Path("runs/moe"))
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    options, settings = with_settings(parser)
    rows = [(count, choice) for count in options.keep for choice in options.choices]
    for count, choice in rows:
        if not (options.runs / f"{choice}-{count}" / "report.json").exists():
            command = row_settings(options.model, options.runs, count, choice)
            status = subprocess.run([sys.executable, "-m", "pipeline", *command, *settings]).returncode
            if status:
                sys.exit(status)
        found = {row: report for row in rows if (report := report_of(options.runs, row)) is not None}
        write(options.results, found, facts(options.model))
    print(table(found))


def row_settings(model: Path, runs: Path, count: int, choice: str) -> list[str]:
    """Return the settings of the run of a row."""
    own = [f"model.path={model}", f"runs={runs}", f"run={choice}-{count}", f"shape.experts={count}"]
    return [*COMMON, *own, *CHOICES[choice]]


def report_of(runs: Path, row: Row) -> dict | None:
    """Return the report of a row; None where it was not run."""
    path = runs / f"{row[1]}-{row[0]}" / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


def facts(model: Path) -> dict[str, Any]:
    """Return how upcycle.py made a mixture; nothing where another tool did."""
    path = model / "upcycled.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, reports: Mapping[Row, dict], made: Mapping[str, Any]) -> None:
    """Write experts.md and experts.json."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = [
        {
            "row": f"{choice}_{count}",
            "experts": count,
            "parameters": report["parameters"],
            "texts": {
                text: {"dense": each["teacher"]} | {STATES[who]: each[who] for who in STATES if who in each}
                for text, each in report["perplexity"].items()
            },
        }
        for (count, choice), report in reports.items()
    ]
    (folder / "experts.json").write_text(json.dumps(figures, indent=1) + "\n")
    command = shlex.join(["python", "benchmarks/moe/expert_rows.py", *sys.argv[1:]])
    lines = [
        "# Fewer experts",
        "",
        f"`{command}`, {os.cpu_count()} CPU cores, {datetime.date.today()}. {caption(made)} Cells: perplexity over "
        "that of the whole mixture, before and after recovery.",
        "",
        table(reports),
    ]
    (folder / "experts.md").write_text("\n".join(lines) + "\n")


def caption(made: Mapping[str, Any]) -> str:
    """Return what the mixture is."""
    if not made:
        return "The mixture was not made by upcycle.py."
    source = "SmolLM2-135M-Instruct in 4 bits" if "smollm2" in str(made["source"]) else str(made["source"])
    return (
        f"The mixture is upcycled from {source}: {made['experts']} noisy copies of each FFN, {made['top']} of a token, "
        f"with routers trained on {made['router_tokens']:,} tokens."
    )


def table(reports: Mapping[Row, dict]) -> str:
    """Return the rows as a Markdown table: the perplexity over the teacher's, before and after recovery, by text."""
    texts = list(next(iter(reports.values()))["perplexity"])
    lines = [f"| experts | choice | {' | '.join(texts)} |", f"|---|---|{'---|' * len(texts)}"]
    for (count, choice), report in reports.items():
        cells = [ratios(report["perplexity"][text]) for text in texts]
        lines.append(f"| {count} | {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(text: dict) -> str:
    """Return a cell: before recovery, where the student was recovered, and after it."""
    whole = text["teacher"]["perplexity"]
    return " → ".join(f"{text[who]['perplexity'] / whole:.3f}" for who in ("start", "student") if who in text)


if __name__ == "__main__":
    main()

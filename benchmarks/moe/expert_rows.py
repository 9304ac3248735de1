"""Fewer experts by REAP, by frequency and at random, before and after recovery, side by side.

    python benchmarks/moe/expert_rows.py MODEL [--keep 6,4] [--choices reap,frequency,random] [--runs runs/moe]
        [settings of the pipeline ...]

MODEL is a mixture, as upcycle.py makes one. A row is one run; one that is finished is not run again, and stages of
equal settings are shared. Printed are perplexities over those of the model itself, by text.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the directory of arguments.py

from arguments import at_least, described, folder_with, several, some_of
from composing import with_settings

CHOICES = {
    "reap": ["score.experts=reap"],
    "frequency": ["score.experts=frequency"],
    "random": ["plan.experts=random"],
}


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("model", type=folder_with("config.json"))
    parser.add_argument("--keep", type=several(at_least(1)), default="6,4", help="experts of a layer, by commas")
    parser.add_argument("--choices", type=some_of(CHOICES), default=",".join(CHOICES))
    parser.add_argument("--runs", type=Path, default=Path("runs/moe"))
    options, settings = with_settings(parser)
    rows = [(count, choice) for count in options.keep for choice in options.choices]
    for count, choice in rows:
        if not (options.runs / f"{choice}-{count}" / "report.json").exists():
            command = row_settings(options.model, options.runs, count, choice)
            status = subprocess.run([sys.executable, "-m", "pipeline", *command, *settings]).returncode
            if status:
                sys.exit(status)
    reports = {row: json.loads((options.runs / f"{row[1]}-{row[0]}" / "report.json").read_text()) for row in rows}
    print(table(reports))


def row_settings(model: Path, runs: Path, count: int, choice: str) -> list[str]:
    """Return the settings of the run of a row."""
    return [f"model.path={model}", f"runs={runs}", f"run={choice}-{count}", f"shape.experts={count}", *CHOICES[choice]]


def table(reports: dict[tuple[int, str], dict]) -> str:
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

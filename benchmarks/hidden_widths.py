"""The hidden axis alone, narrowed: plain channels, SLNP, and the principal basis, with the tie broken or kept.

    python benchmarks/quality/texts.py
    python benchmarks/hidden_widths.py [--rows slnp512,untied512] [--seeds 0] [settings of the pipeline ...]

Every row is one run of the pipeline without recovery, hidden-<way><width>-<seed>, of SmolLM2: rows share the teacher,
the tokens, the scores and the turned teacher, resume where they were cut off, and are not run twice. The table goes to
benchmarks/results/hidden_widths.md, the figures beside it as JSON: perplexity over the dense model's as it was cut.
"""

import json
from pathlib import Path

from ablation import Report, parser, reports, run_rows, unseen, write_table
from composing import with_settings

from pipeline.evaluation.perplexity import finite
from pipeline.report.facts import perplexity_of

PREFIX = "hidden"
WIDTHS = (544, 512, 448)
PRINCIPAL = ("rotate.kind=principal", "plan.channels=leading", "reinit.slnp=true")
WAYS = {
    "plain": ("channels by score", ("reinit.slnp=false",)),
    "slnp": ("... and SLNP", ("reinit.slnp=true",)),
    "tied": ("principal basis and SLNP, tie kept", (*PRINCIPAL, "rotate.tie=keep")),
    "untied": ("principal basis and SLNP, untied", (*PRINCIPAL, "rotate.tie=untied")),
}
ROWS = {f"{way}{width}": (way, width) for width in WIDTHS for way in WAYS}
COMMON = (
    "recipe.stages=[importance,shape,rotate,plan,cut,export,evaluate,report]",
    "plan.clap=false",
    "data.calibration.path=[builtin:topics,builtin:docstrings]",
    "data.recovery.path=[builtin:topics,builtin:docstrings]",
    "data.split.evaluation=0.1",
    "score.tokens=16384",
    "rotate.tokens=32768",
    "evaluate.tokens=4096",
    "evaluate.words=0",
    "evaluate.speed=false",
    "report.samples=0",
    "track.mode=disabled",
)
NONE = "·"


def main() -> None:
    options = parser(__doc__, ROWS)
    options.add_argument("--texts", type=Path, default=Path("runs/texts"), help="where quality/texts.py wrote")
    request, settings = with_settings(options)
    chosen = {row: row_settings(row, request.texts, settings) for row in ROWS}
    run_rows(PREFIX, chosen, request, lambda: write(request.runs, request.results))


def row_settings(row: str, texts: Path, settings: list[str]) -> list[str]:
    """Return the settings of a row; those of the command come last and win."""
    way, width = ROWS[row]
    return [*COMMON, *unseen(texts, settings), f"shape.hidden={width}", *WAYS[way][1], *settings]


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row that has a report."""
    found = {which: _figures(report) for which, report in reports(PREFIX, ROWS, runs).items()}
    texts = sorted({text for figures in found.values() for text in figures["ratios"]})
    lines = []
    for (row, seed), figures in found.items():
        way, width = ROWS[row]
        inner = f"{figures['inner'] / 1e6:.1f} M, all {figures['all'] / 1e6:.1f} M"
        cells = [f"{figures['ratios'][text]:.2f}" if text in figures["ratios"] else NONE for text in texts]
        lines.append([str(width), WAYS[way][0], str(seed), inner, *cells])
    columns = ["hidden width", "how", "seed", "parameters without embeddings", *texts]
    caption = "Perplexity over the dense model's, as it was cut; settings in the script."
    write_table(results / "hidden_widths.md", "The hidden axis alone, SmolLM2-135M", caption, columns, lines)
    figures = [{"row": row, "seed": seed} | each for (row, seed), each in found.items()]
    (results / "hidden_widths.json").write_text(json.dumps(finite(figures), indent=1) + "\n")


def _figures(report: Report) -> dict:
    return {
        "inner": report["non_embedding_parameters"]["student"],
        "all": report["parameters"]["student"],
        "ratios": {name: each["student"] / each["teacher"] for name, each in perplexity_of(report).items()},
    }


if __name__ == "__main__":
    main()

"""Re-initialisation, ablated: Minitron, none, CLAP, SLNP, both; before and after recovery, on several domains.

    python benchmarks/reinit_ablation.py [--seeds 0,1] [--rows minitron,none,clap,slnp,both] [settings ...]

Every row is one run of the pipeline, so rows share the teacher, the tokens and the scores, resume where they were cut
off, and are not run twice. The table goes to benchmarks/results/reinit_ablation.md, the figures beside it as JSON.
"""

import json
from pathlib import Path

from ablation import parser, reports, run_rows, write_table
from composing import with_settings

from pipeline.evaluation.perplexity import finite
from pipeline.report.facts import perplexity_of

PREFIX = "reinit"
ROWS = {
    "minitron": ("Minitron (its own score)", ["recipe=minitron"]),
    "none": ("none (Pangu Light's score)", ["plan.clap=false", "reinit.slnp=false"]),
    "clap": ("+ CLAP", ["plan.clap=true", "reinit.slnp=false"]),
    "slnp": ("+ SLNP", ["plan.clap=false", "reinit.slnp=true"]),
    "both": ("+ CLAP + SLNP (Pangu Light)", ["plan.clap=true", "reinit.slnp=true"]),
}
COMMON = [
    "shape.layers=26",
    "shape.hidden=512",
    "shape.neurons=1152",
    "shape.heads=9",
    "shape.groups=3",
    "data.calibration.path=[builtin:topics,builtin:docstrings]",
    "data.recovery.path=[builtin:topics,builtin:docstrings]",
    "data.evaluation.path=[builtin:topics,builtin:docstrings,builtin:readmes]",
    "data.split.evaluation=0.1",
    "distill.tokens=120000",
    "distill.learning_rate=3e-4",
    "evaluate.tokens=8192",
    "evaluate.words=0",
    "evaluate.speed=false",
    "report.samples=0",
]


def main() -> None:
    options, settings = with_settings(parser(__doc__, ROWS))
    chosen = {row: [*COMMON, *own, *settings] for row, (_, own) in ROWS.items()}
    run_rows(PREFIX, chosen, options, lambda: write(options.runs, options.results))


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row that has a report."""
    found = {which: perplexity_of(report) for which, report in reports(PREFIX, ROWS, runs).items()}
    domains = sorted({domain for report in found.values() for domain in report})
    columns = ["re-initialisation", "seed", *(f"{d}: {when}" for d in domains for when in ("dense", "before", "after"))]
    lines = [
        [
            ROWS[row][0],
            str(seed),
            *(f"{report[d][who]:.1f}" for d in domains for who in ("teacher", "start", "student")),
        ]
        for (row, seed), report in found.items()
    ]
    caption = "Perplexity, lower is better; settings in the script."
    write_table(results / "reinit_ablation.md", "Re-initialisation, ablated", caption, columns, lines)
    figures = [
        {"row": row, "seed": seed, "domain": domain} | report[domain]
        for (row, seed), report in found.items()
        for domain in domains
    ]
    (results / "reinit_ablation.json").write_text(json.dumps(finite(figures), indent=1))


if __name__ == "__main__":
    main()

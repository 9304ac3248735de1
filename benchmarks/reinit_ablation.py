"""Re-initialisation, ablated: none, CLAP, SLNP, both; before and after recovery, on unseen text of several domains.

    python benchmarks/reinit_ablation.py [--seeds 0,1] [--rows none,clap,slnp,both] [settings of the pipeline ...]

Every row is one run of the pipeline, so rows share the teacher, the tokens and the scores, resume where they were cut
off, and are not run twice. The table goes to benchmarks/results/reinit_ablation.md, the figures beside it as JSON.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.report.facts import perplexity_of

HERE = Path(__file__).resolve().parent
ROWS = {
    "none": ("Minitron (no re-initialisation)", ["plan.clap=false", "reinit.slnp=false"]),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--runs", default="runs")
    asked, settings = parser.parse_known_args()
    for seed in asked.seeds.split(","):
        for row in asked.rows.split(","):
            name = f"reinit-{row}-{seed}"
            command = [sys.executable, "-m", "pipeline", f"run={name}", f"runs={asked.runs}", f"seed={seed}"]
            subprocess.run([*command, *COMMON, *ROWS[row][1], *settings], check=True)
            write(Path(asked.runs), settings)


def write(runs: Path, settings: list[str]) -> None:
    """Write the table of every row that has a report."""
    found = {}
    for path in sorted(runs.glob("reinit-*-*/report.json")):
        _, row, seed = path.parent.name.split("-")
        found[row, int(seed)] = perplexity_of(json.loads(path.read_text()))
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    domains = sorted({domain for report in found.values() for domain in report})
    figures = [
        {"row": row, "seed": seed, "domain": domain} | report[domain]
        for (row, seed), report in found.items()
        for domain in domains
    ]
    (results / "reinit_ablation.json").write_text(json.dumps(figures, indent=1))
    lines = [
        "# Re-initialisation, ablated",
        "",
        f"`python benchmarks/reinit_ablation.py {' '.join(settings)}`, {os.cpu_count()} CPU cores, "
        f"{datetime.date.today()}. Perplexity, lower is better; settings in the script.",
        "",
        "| re-initialisation | seed | " + " | ".join(f"{d}: dense | before | after" for d in domains) + " |",
        "|---|---|" + "---|---|---|" * len(domains),
    ]
    for row, (label, _) in ROWS.items():
        for seed in sorted(s for r, s in found if r == row):
            report = found[row, seed]
            cells = [f"{report[d][who]:.1f}" for d in domains for who in ("teacher", "start", "student")]
            lines.append(f"| {label} | {seed} | " + " | ".join(cells) + " |")
    (results / "reinit_ablation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Attentions and FFNs removed alone, against whole layers, at equal parameters; before and after a short recovery.

    python benchmarks/sublayers.py [--seeds 0,1] [--rows layers,bypass,clap,sublayers] [settings of the pipeline ...]

Every row keeps at most 24 / 30 of SmolLM2-135M's parameters outside the embeddings. Rows are runs of the pipeline, so
they share the teacher, the tokens and the choice of layers, resume where they were cut off, and are not run twice. The
table goes to benchmarks/results/sublayers.md, the figures beside it as JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablation import parser, reports, run_rows, write_table
from composing import with_settings

from pipeline.evaluation.perplexity import finite
from pipeline.report.facts import perplexity_of

PREFIX = "sublayers"
LAYERS = ["budget.axes=layers", "plan.depth=loss"]
ROWS = {
    "layers": ("whole layers, by measured loss", [*LAYERS, "plan.clap=false"]),
    "bypass": ("whole layers, a linear map in their place", [*LAYERS, "plan.clap=false", "reinit.bypass=true"]),
    "clap": ("whole layers, their KV groups donated (CLAP)", [*LAYERS, "plan.clap=true"]),
    "sublayers": (
        "attentions and FFNs, by rise of the KL per parameter",
        ["budget.axes=sublayers", "plan.clap=false", "sublayers.score=kl_per_size"],
    ),
    "sublayers_kl": (
        "attentions and FFNs, by KL",
        ["budget.axes=sublayers", "plan.clap=false", "sublayers.score=kl"],
    ),
}
COMMON = [
    "budget.parameters=0.801",  # 24 of 30 layers and the final norm
    "sublayers.candidates=10",
    "plan.depth_tokens=512",
    "score.tokens=8192",
    "reinit.bypass_tokens=8192",
    "data.calibration.path=[builtin:topics,builtin:docstrings]",
    "data.recovery.path=[builtin:topics,builtin:docstrings]",
    "data.evaluation.path=[builtin:topics,builtin:readmes]",
    "data.split.evaluation=0.1",
    "distill.tokens=8192",
    "evaluate.tokens=4096",
    "evaluate.words=0",
    "evaluate.speed=false",
    "report.samples=0",
    "track.mode=disabled",
]


def main() -> None:
    options, settings = with_settings(parser(__doc__, ROWS))
    chosen = {row: [*COMMON, *own, *settings] for row, (_, own) in ROWS.items()}
    run_rows(PREFIX, chosen, options, lambda: write(options.runs, options.results))


def figures(row: str, seed: int, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run removed and keeps, and its perplexities by text."""
    inner, cut = report["non_embedding_parameters"], report["cut"]
    return {
        "row": row,
        "seed": seed,
        "kept": inner["student"] / inner["teacher"],
        "kv_bytes_per_token": report["kv_bytes_per_token"],
        "layers": cut["dropped_layers"],
        "attention": cut["removed_attention"],
        "ffn": cut["removed_ffn"],
        "texts": perplexity_of(report),
    }


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row that has a report."""
    found = [figures(row, seed, report) for (row, seed), report in reports(PREFIX, ROWS, runs).items()]
    texts = sorted({text for each in found for text in each["texts"]})
    states = (("teacher", "teacher"), ("before", "start"), ("after", "student"))
    columns = ["removed", "seed", "parameters kept", "KV bytes per token", "layers, attentions, FFNs removed"]
    columns += [f"{text}: {when}" for text in texts for when, _ in states]
    lines = [
        [
            ROWS[each["row"]][0],
            str(each["seed"]),
            f"{each['kept']:.1%}",
            str(each["kv_bytes_per_token"]["student"]),
            f"{len(each['layers'])}, {len(each['attention'])}, {len(each['ffn'])}",
            *(f"{each['texts'][text][who]:.1f}" for text in texts for _, who in states),
        ]
        for each in found
    ]
    caption = "Perplexity before and after 8k tokens of recovery, lower is better; settings in the script."
    write_table(results / "sublayers.md", "Sub-layers against whole layers", caption, columns, lines)
    (results / "sublayers.json").write_text(json.dumps(finite(found), indent=1) + "\n")


if __name__ == "__main__":
    main()

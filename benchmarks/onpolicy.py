"""On-policy distillation of a chat model against more recovery, at equal tokens of answers.

    python benchmarks/onpolicy.py [--seeds 0,1] [--rows recovered,longer,on_policy] [settings of the pipeline ...]

SmolLM2-135M-Instruct loses three of its 30 layers and is recovered on the assistant's turns of chats: a user gives the
beginning of a paragraph of the built-in topics, the assistant continues it. Rows: this recovery; a longer one; and this
one, followed by on-policy distillation, which trains on no more tokens of answers than the longer one adds. Measured
are the KL to the teacher and equal first choices on the answers of other chats, and greedy answers. Rows are runs of
the pipeline, onpolicy-<row>-<seed>, which share what they have in common. The table goes to
benchmarks/results/onpolicy.md, the figures beside it as JSON.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ablation import Report, parser, reports, run_rows, write_table
from composing import with_settings

from pipeline.data.builtin import BUILTINS

PREFIX = "onpolicy"
PROMPT = "Continue this text: {}"
SHORT = "distill.tokens=6144"
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "recovered": ("recovery", (SHORT,)),
    "longer": ("longer recovery", ("distill.tokens=12288",)),
    "on_policy": ("recovery, then on-policy", (SHORT, "onpolicy.tokens=2304")),
}
COMMON = (
    "shape.layers=27",
    "plan.clap=false",
    "reinit.slnp=false",
    "data.text_field=messages",
    "data.loss_on=assistant",
    "data.sequence_length=256",
    "data.split={evaluation: 0.25, calibration: 0.05}",
    "score.tokens=2048",
    "distill.learning_rate=2e-4",
    "distill.eval_tokens=1024",
    "distill.eval_steps=100",
    "distill.save_steps=100",
    "onpolicy.prompt_tokens=96",
    "onpolicy.min_new_tokens=16",
    "onpolicy.max_new_tokens=48",
    "onpolicy.global_batch_size=8",
    "onpolicy.micro_batch_size=8",
    "onpolicy.learning_rate=1e-4",
    "evaluate.tokens=4096",
    "evaluate.answers=16",
    "evaluate.answer_tokens=24",
    "evaluate.words=0",
    "evaluate.speed=false",
    "report.samples=0",
    "track.mode=disabled",
)
Figures = dict[str, object]


def main() -> None:
    options, settings = with_settings(parser(__doc__, ROWS))
    chats = options.runs / f"{PREFIX}-chats.jsonl"
    chats.parent.mkdir(parents=True, exist_ok=True)
    chats.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in written("topics")))
    chosen = {row: row_settings(row, chats, settings) for row in ROWS}
    run_rows(PREFIX, chosen, options, lambda: write(options.runs, options.results))


def written(*names: str) -> Iterator[list[dict[str, str]]]:
    """Yield a chat for each paragraph of built-in texts that has two sentences: the first, and the others."""
    for text in (text for name in names for text in BUILTINS[name]()):
        for paragraph in text.split("\n\n"):
            first, _, rest = " ".join(paragraph.split()).partition(". ")
            if len(first) > 40 and len(rest) > 80:
                opening = {"role": "user", "content": PROMPT.format(f"{first}.")}
                yield [opening, {"role": "assistant", "content": rest[:500]}]


def row_settings(row: str, chats: Path, settings: Sequence[str]) -> list[str]:
    """Return the settings of a row, which reads one part of the chats and is measured on another."""
    texts = [f"data.{purpose}.path={chats}" for purpose in ("calibration", "recovery", "evaluation")]
    return [*COMMON, *texts, *ROWS[row][1], *settings]


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row that has a report."""
    found = [figures(row, seed, report) for (row, seed), report in reports(PREFIX, ROWS, runs).items()]
    columns = ["row", "training", "seed", "tokens read", "tokens written", "minutes", "KL on answers"]
    columns += ["equal first choices", "greedy answers equal", "before their first difference"]
    caption = (
        "KL in nats per token, ± its standard error over sequences; greedy answers have at most 24 tokens; settings in "
        "the script."
    )
    write_table(results / "onpolicy.md", "On-policy distillation", caption, columns, [line(each) for each in found])
    (results / "onpolicy.json").write_text(json.dumps(found, indent=1) + "\n")


def figures(row: str, seed: int, report: Report) -> Figures:
    """Return the tokens and minutes of a row's trainings, and what was measured on answers."""
    (text,) = report["perplexity"].values()
    answers, costs = text["assistant"], report["stages"]
    return {
        "row": row,
        "seed": seed,
        "read": int(report["recovery"]["tokens"]),
        "written": int(report.get("onpolicy", {"tokens": 0})["tokens"]),
        "minutes": sum(costs[name]["seconds"] for name in ("distill", "onpolicy") if name in costs) / 60,
        **{key: answers[key] for key in ("kl", "kl_error", "agreement", "greedy")},
        "perplexity": {who: answers[who]["perplexity"] for who in ("teacher", "student")},
    }


def line(found: Mapping[str, object]) -> Sequence[str]:
    """Return the cells of a row."""
    greedy: Mapping = found["greedy"]  # type: ignore[assignment]
    return [
        f"`{found['row']}`",
        ROWS[str(found["row"])][0],
        str(found["seed"]),
        f"{found['read']:,}",
        f"{found['written']:,}",
        f"{found['minutes']:.1f}",
        f"{found['kl']:.4f} ± {found['kl_error']:.4f}",
        f"{found['agreement']:.1%}",
        f"{greedy['identical']:.1%} of {greedy['answers']}",
        f"{greedy['shared']:.1%}",
    ]


if __name__ == "__main__":
    main()

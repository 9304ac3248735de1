"""A chat model made 30 % smaller in all its parameters: cut, recovered on chats, then on its own answers.

    python -m pipeline run=chats recipe=generate self_generate.form=messages self_generate.tokens=131072 \\
        self_generate.length=512 self_generate.temperature=0.7 data.text_field=messages
    python benchmarks/chat.py --chats runs/chats/generated.jsonl [--rows cut,recovered,longer,on_policy]
        [settings of the pipeline ...]

SmolLM2-135M-Instruct is calibrated and recovered on the assistant's turns of chats that it wrote and of chats made from
the built-in texts: a user gives the beginning of a paragraph, the assistant continues it. Measured are its answers in
chats it wrote that no row reads: the KL to the teacher, equal first choices, and greedy answers. Rows are runs of the
pipeline, chat-<row>-<seed>, which share what they have in common. The table goes to benchmarks/results/chat.md, the
figures beside it as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablation import Report, parser, reports, run_rows, write_table
from arguments import existing
from composing import composed, with_settings
from onpolicy import written

PREFIX = "chat"
RECOVERY = "distill.tokens=131072"
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cut": ("none", ()),
    "recovered": ("recovery", (RECOVERY,)),
    "longer": ("longer recovery", ("distill.tokens=163840",)),
    "on_policy": ("recovery, then on-policy", (RECOVERY, "onpolicy.tokens=8192")),
}
COMMON = (
    "recipe=best",
    "budget.total=0.705",
    "data.text_field=messages",
    "data.loss_on=assistant",
    "data.sequence_length=512",
    "data.split={evaluation: 0.25, calibration: 0.15}",
    "score.tokens=16384",
    "restore.tokens=16384",
    "local_distill.tokens=32768",
    "distill.global_batch_size=4",
    "distill.micro_batch_size=4",
    "distill.eval_tokens=2048",
    "distill.save_steps=1000",
    "onpolicy.prompt_tokens=192",
    "onpolicy.max_new_tokens=64",
    "onpolicy.global_batch_size=8",
    "onpolicy.micro_batch_size=8",
    "evaluate.tokens=16384",
    "evaluate.answers=48",
    "evaluate.answer_tokens=48",
    "evaluate.words=0",
    "evaluate.speed=false",
    "track.mode=disabled",
)


def main() -> None:
    own = parser(__doc__, ROWS)
    own.add_argument("--chats", type=existing, required=True, help="chats that the teacher wrote")
    options, settings = with_settings(own)
    made = options.runs / f"{PREFIX}-paragraphs.jsonl"
    made.parent.mkdir(parents=True, exist_ok=True)
    chats = written("topics", "docstrings", "readmes")
    made.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats))
    texts = [f"data.{purpose}.path=[{options.chats},{made}]" for purpose in ("calibration", "recovery")]
    texts.append(f"data.evaluation.path={options.chats}")
    chosen = {row: row_settings(row, [*texts, *settings]) for row in ROWS}
    run_rows(PREFIX, chosen, options, lambda: write(options.runs, options.results))


def row_settings(row: str, settings: Sequence[str]) -> list[str]:
    """Return the settings of a row; without a recovery, `distill` is left out of the recipe."""
    chosen = [*COMMON, *ROWS[row][1], *settings]
    if not ROWS[row][1]:
        stages = [name for name in composed(chosen)["recipe"]["stages"] if name not in ("distill", "onpolicy")]
        chosen.append(f"recipe.stages=[{','.join(stages)}]")
    return chosen


def tokens_of(report: Report, training: str) -> int:
    """Return the tokens of a training; 0 where the run had none."""
    return int((report.get(training) or {"tokens": 0})["tokens"])


def figures(row: str, seed: int, report: Report) -> dict[str, object]:
    """Return the sizes of a row's student, the tokens of its training, and what was measured on answers."""
    (text,) = report["perplexity"].values()
    sizes, answers = report["parameters"], text["assistant"]
    return {
        "row": row,
        "seed": seed,
        "kept": sizes["student"] / sizes["teacher"],
        "read": tokens_of(report, "recovery"),
        "written": tokens_of(report, "onpolicy"),
        **{key: answers[key] for key in ("kl", "kl_error", "agreement", "greedy")},
        "perplexity": {who: answers[who]["perplexity"] for who in ("teacher", "student")},
    }


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row that has a report."""
    found = [figures(row, seed, report) for (row, seed), report in reports(PREFIX, ROWS, runs).items()]
    columns = ["row", "training", "seed", "parameters kept", "tokens read", "tokens written", "KL on answers"]
    columns += ["equal first choices", "greedy answers agree for", "perplexity over the teacher's"]
    caption = "KL in nats per token, ± its standard error over sequences; settings in the script."
    write_table(results / "chat.md", "A smaller chat model", caption, columns, [line(each) for each in found])
    (results / "chat.json").write_text(json.dumps(found, indent=1) + "\n")


def line(found: Mapping) -> list[str]:
    """Return the cells of a row."""
    return [
        f"`{found['row']}`",
        ROWS[found["row"]][0],
        str(found["seed"]),
        f"{found['kept']:.1%}",
        f"{found['read']:,}",
        f"{found['written']:,}",
        f"{found['kl']:.3f} ± {found['kl_error']:.3f}",
        f"{found['agreement']:.1%}",
        f"{found['greedy']['shared']:.1%}",
        f"{found['perplexity']['student'] / found['perplexity']['teacher']:.2f}",
    ]


if __name__ == "__main__":
    main()

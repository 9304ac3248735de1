"""Recipes at equal text, equal recovery tokens and equal parameters, on text that no setting was chosen on.

    python benchmarks/quality/frozen.py
    python benchmarks/equal_terms.py [--seeds 0,1] [--rows best_plain,tyr] [--texts runs/texts] [settings ...]

Every row keeps 22/30 of SmolLM2-135M's parameters outside the embeddings (within 1 %): whole layers, which two rows
remove, allow that share exactly. Calibration and recovery read the built-in topics and docstrings. A row that trains
on more than that is listed in APART. Rows are runs of the pipeline, so they share the teacher, the tokens and equal
scores, resume where they were cut off, and are not run twice. The table goes to benchmarks/results/equal_terms.md, the
figures beside it as JSON; rows in that file that the command does not run stay.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ablation import parser, reports, run_rows, write_table
from composing import composed, with_settings

PREFIX = "equal"
TEXTS = ("finance", "constellations")
KEPT = 22 / 30
NARROW = ("shape.layers=28", "shape.hidden=544", "shape.neurons=1184")  # 77.5M of 77.9M parameters
LAYERS = ("recipe=pangu_light", "plan.clap=false", "reinit.slnp=false", "shape.layers=22")
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "best_plain": ("best, without local distillation", ("recipe=best", "shape.neurons=992", "local_distill.epochs=0")),
    "pangu_light": ("Pangu Light", ("recipe=pangu_light", *NARROW)),
    "no_slnp": ("Pangu Light without SLNP", ("recipe=pangu_light", "reinit.slnp=false", *NARROW)),
    "no_clap": ("Pangu Light without CLAP", ("recipe=pangu_light", "plan.clap=false", *NARROW)),
    "minitron": ("Minitron: its own score, neither", ("recipe=minitron", *NARROW)),
    "tyr": ("Týr-the-Pruner, recovered", ("recipe=tyr", f"budget.parameters={KEPT:.5f}", "supernet.rounds=1")),
    "trsp": ("TRSP, trains before removal only", ("recipe=trsp", "shape.layers=22", "layer_gates.tokens=8192",
             "layer_gates.batch_size=1", "layer_gates.learning_rate=3e-2")),
    "adapt_pruner": ("Adapt-Pruner", ("recipe=adapt_pruner", f"budget.parameters={KEPT:.5f}")),
    "flap": ("FLAP, recovered", ("recipe=flap", f"budget.parameters={KEPT:.5f}")),
    "drop_influence": ("layers of least block influence", LAYERS),
    "best": ("best, with 3 x 65k tokens of local distillation", ("recipe=best", "shape.neurons=992")),
}  # fmt: skip
APART = ("best",)  # trains on more tokens than the others; stands last in the table
COMMON = (
    "data.calibration.path=[builtin:topics,builtin:docstrings]",
    "data.recovery.path=[builtin:topics,builtin:docstrings]",
    "score.tokens=16384",
    "restore.tokens=16384",
    "plan.depth_tokens=1024",
    "distill.tokens=32768",
    "distill.global_batch_size=2",
    "distill.micro_batch_size=2",
    "evaluate.tokens=32768",
    "evaluate.words=0",
    "evaluate.speed=false",
    "report.samples=0",
    "track.mode=disabled",
)
Figures = dict[str, Any]


def main() -> None:
    own = parser(__doc__, ROWS)
    own.add_argument("--texts", type=Path, default=Path("runs/texts"), help="where frozen.py wrote")
    options, settings = with_settings(own)
    missing = [name for name in TEXTS if not (options.texts / f"{name}.jsonl").is_file()]
    if missing:
        own.error(f"--texts: {options.texts} has no {missing[0]}.jsonl; benchmarks/quality/frozen.py writes it")
    measured = f"data.evaluation.path=[{','.join(str(options.texts / f'{name}.jsonl') for name in TEXTS)}]"
    chosen = {row: recovered([*COMMON, measured, *given, *settings]) for row, (_, given) in ROWS.items()}
    run_rows(PREFIX, chosen, options, lambda: write(options.runs, options.results))


def recovered(settings: Sequence[str]) -> list[str]:
    """Return settings with `distill` before `export` where the recipe neither recovers nor trains before removal."""
    recipe = composed(settings)["recipe"]
    if "distill" in recipe["stages"] or recipe["name"] == "trsp":
        return list(settings)
    place = recipe["stages"].index("export")
    stages = [*recipe["stages"][:place], "distill", *recipe["stages"][place:]]
    return [*settings, f"recipe.stages=[{','.join(stages)}]"]


def figures(row: str, seed: int, report: Mapping[str, Any]) -> Figures:
    """Return the sizes of a run and, by text and state, perplexity, the teacher's times what, and the error of that."""
    inner = report["non_embedding_parameters"]
    texts = {
        name: {
            when: {"perplexity": text[who]["perplexity"], **text[who]["over_teacher"]}
            for who, when in (("start", "before"), ("student", "after"))
            if who in text
        }
        | {"teacher": text["teacher"]["perplexity"]}
        for name, text in report["perplexity"].items()
    }
    kept = {"kept": inner["student"] / inner["teacher"], "kv_bytes_per_token": report["kv_bytes_per_token"]["student"]}
    return {"row": row, "seed": seed, **kept, "texts": texts}


def write(runs: Path, results: Path) -> None:
    """Write the table, and its figures, of every row with a report, or that an earlier command wrote to the file."""
    place = results / "equal_terms.json"
    earlier = json.loads(place.read_text(encoding="utf-8")) if place.exists() else []
    by_run = {(each["row"], each["seed"]): each for each in earlier}
    by_run |= {key: figures(*key, report) for key, report in reports(PREFIX, ROWS, runs).items()}
    found = [by_run[key] for key in sorted(by_run, key=lambda key: (list(ROWS).index(key[0]), key[1]))]
    columns = ["row", "recipe", "removed", "KV bytes", *(f"{text}: {when}" for text in TEXTS for when in STATES)]
    lines = [line(row, [each for each in found if each["row"] == row]) for row in ROWS]
    lines = [each for each in lines if each]
    caption = "Perplexity over the teacher's by seed, ± the largest standard error over 64 sequences; the command of "
    caption += "the last row."
    write_table(results / "equal_terms.md", "Recipes on equal terms", caption, columns, lines)
    place.write_text(json.dumps(found, indent=1) + "\n")


STATES = ("before", "after")


def line(row: str, runs: Sequence[Figures]) -> list[str]:
    """Return the cells of a row; none where no run has finished."""
    if not runs:
        return []
    removed = f"{100 * (1 - mean(each['kept'] for each in runs)):.1f} %"
    cells = [f"`{row}`", ROWS[row][0], removed, f"{mean(each['kv_bytes_per_token'] for each in runs):.0f}"]
    for text in TEXTS:
        for when in STATES:
            states = [each["texts"][text].get(when) for each in runs]
            if None in states:
                cells.append("·")
                continue
            ratios = " / ".join(f"{state['times']:.2f}" for state in states)
            cells.append(f"{ratios} ± {max(state['error'] for state in states):.2f}")
    return cells


if __name__ == "__main__":
    main()

"""dense: the teacher measured on held-out text, once for all students that are compared with it."""

import json
from pathlib import Path

from pipeline import measuring
from pipeline.config import Config
from pipeline.evaluation import tasks
from pipeline.evaluation.perplexity import finite
from pipeline.runtime.checkpoint import load_tokenizer

MAKES = "dense"
NEEDS = ("teacher", "tokens")
COMPARES = True  # with the teacher as it was given, corrected or not
EVERY_RANK = True
REVISION = measuring.REVISION


def check(config: Config) -> None:
    """Refuse tasks that cannot be run here, before any work."""
    tasks.check(config.evaluate.tasks)


def settings(config: Config) -> dict:
    """Give what determines the figures."""
    return measuring.settings(config)


def run(config: Config, inputs: dict[str, Path], out: Path, machine) -> None:
    """Write dense.json: what is asked of each text, the teacher's figures on it, and what it says to the prompts."""
    tokenizer = load_tokenizer(inputs["teacher"], config.model.trust_remote_code)
    bench = measuring.Bench(config, inputs["tokens"], tokenizer, machine)
    facts = bench.facts()
    with bench.placed(inputs["teacher"]) as model:
        found = {"facts": facts, "figures": bench.measure(model, "teacher", facts)}
        if machine.ranks.rank == 0:
            (out / "dense.json").write_text(json.dumps(finite(found | bench.show(model)), indent=1) + "\n")

"""dense: the teacher measured on held-out text, once for all students that are compared with it."""

import json
from pathlib import Path

from pipeline import evaluator
from pipeline.config import Config
from pipeline.evaluation import tasks
from pipeline.evaluation.perplexity import finite
from pipeline.runtime.checkpoint import load_tokenizer
from pipeline.runtime.machine import Machine
from pipeline.stages.stage import Inputs, Stage


def check(config: Config) -> None:
    """Refuse tasks that cannot be run here, before any work."""
    tasks.check(config.evaluate.tasks)


def settings(config: Config) -> dict:
    """Give what determines the figures."""
    return evaluator.settings(config)


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write dense.json: what is asked of each text, the teacher's figures on it, and what it says to the prompts."""
    tokenizer = load_tokenizer(inputs["reference"], config.model.trust_remote_code)
    bench = evaluator.Bench(config, inputs["tokens"], tokenizer, machine)
    facts = bench.facts()
    with bench.placed(inputs["reference"]) as model:
        found = {"facts": facts, "figures": bench.measure(model, "teacher", facts)}
        if machine.ranks.rank == 0:
            (out / "dense.json").write_text(json.dumps(finite(found | bench.show(model)), indent=1) + "\n")


STAGE = Stage(
    name="evaluate_reference",
    makes="reference_evaluation",
    run=run,
    settings=settings,
    needs=("reference", "tokens"),
    check=check,
    implied=True,
    revision=evaluator.REVISION,
)

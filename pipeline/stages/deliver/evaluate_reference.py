"""evaluate_reference: the reference model on held-out text, once for all students that are compared with it."""

from pathlib import Path
from typing import Any

from pipeline import evaluator
from pipeline.config import Config
from pipeline.evaluation import tasks
from pipeline.evaluation.results import ReferenceEvaluation
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_tokenizer
from pipeline.stages.stage import Inputs, Stage


def check(config: Config) -> None:
    """Refuse tasks that cannot be run here, before any work."""
    tasks.check(evaluator.tasks_of(config))


def settings(config: Config) -> dict[str, Any]:
    """Return what determines the figures."""
    return evaluator.settings(config)


def run(config: Config, inputs: Inputs, out: Path, machine: Machine) -> None:
    """Write reference.json: facts of every text, the model's figures on it, and its behaviour."""
    tokenizer = load_tokenizer(inputs["reference"], config.model.trust_remote_code)
    bench = evaluator.Bench(config, inputs["reference_tokens"], tokenizer, machine)
    facts = bench.facts()
    with bench.placed(inputs["reference"]) as model:
        figures = bench.measure(model, "teacher", facts)
        if machine.ranks.rank == 0:
            ReferenceEvaluation(facts, figures, bench.behaviour(model, inputs["reference"])).save(out)


STAGE = Stage(
    name="evaluate_reference",
    makes="reference_evaluation",
    run=run,
    settings=settings,
    needs=("reference", "reference_tokens"),
    check=check,
    implied=True,
    revision=evaluator.REVISION,
)

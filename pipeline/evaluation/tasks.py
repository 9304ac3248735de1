"""Benchmark tasks of the LM Evaluation Harness (extra `eval`), by name or as local task files."""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

BOOTSTRAP = 1000  # resamples for the standard error of a metric that is no plain mean


def installed() -> bool:
    """Return whether the harness can be imported here."""
    return find_spec("lm_eval") is not None


def check(tasks: Sequence[str]) -> None:
    """Raise ValueError for tasks that cannot run: the extra or a task file is missing, or a name is unknown."""
    if tasks and not installed():
        raise ValueError(
            f"evaluate.tasks: {list(tasks)} needs the package lm_eval, which is missing; "
            "install the extra: pip install '.[eval]'"
        )
    for task in tasks:
        if is_file(task) and not Path(task).is_file():
            raise ValueError(f"evaluate.tasks: the task file {task} does not exist; correct the path")
    named = [task for task in tasks if not is_file(task)]
    if named:
        check_names(named, _manager(include_defaults=True).all_tasks)


def check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for tasks that are not among the known ones, with those that have a similar name."""
    unknown = [task for task in tasks if task not in known]
    if unknown:
        near = [name for task in unknown for name in get_close_matches(task, known, n=3)]
        remedy = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists the known ones"
        raise ValueError(f"evaluate.tasks: the installed lm_eval has no {unknown}; {remedy}")


def measure(
    model: torch.nn.Module, tokenizer: Any, tasks: Sequence[str], batch: int, templated: bool
) -> dict[str, dict[str, float]]:
    """Return the metrics of each task by the harness's names (`acc`, ...), and `questions`, their number.

    `templated`: questions are turns of the tokenizer's chat template.
    """
    if not tasks:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wanted = [str(Path(task).absolute()) if is_file(task) else task for task in tasks]
    manager = _manager(include_defaults=not all(map(is_file, wanted)))
    subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = simple_evaluate(
        subject,
        tasks=wanted,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=templated,
    )
    return {task: _numbers(metrics, found["n-samples"].get(task)) for task, metrics in found["results"].items()}


def is_file(task: str) -> bool:
    """Return whether a task is a file of its own rather than a name of the harness."""
    return task.endswith((".yaml", ".yml"))


@cache
def _manager(include_defaults: bool) -> Any:
    """Return the harness's index of tasks, made once a process: indexing its own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _numbers(metrics: dict[str, Any], samples: dict[str, int] | None) -> dict[str, float]:
    plain = {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not name.startswith(("alias", "sample_len"))
    }
    return plain if samples is None else plain | {"questions": samples["effective"]}

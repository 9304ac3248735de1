"""The LM Evaluation Harness: the tasks it knows, and the metrics of a model on tasks.

Also a program for a Python that has vLLM and the harness but not this package: `python -I harness.py REQUEST ANSWER`.
REQUEST is a JSON file. With `model` (a folder that vLLM loads), `dtype`, `arguments`, `tasks` and `templated`, ANSWER
gets the metrics of the model; with none of them, the packages that are missing and the tasks that are known.
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BOOTSTRAP = 1000  # resamples for the standard error of a metric that is no plain mean
NEEDED = ("lm_eval", "vllm")  # packages of the Python that runs this file as a program


@cache
def manager(include_defaults: bool) -> Any:
    """Return the harness's index of tasks, made once a process: indexing its own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def known_tasks() -> list[str]:
    """Return the names of the harness's tasks."""
    return list(manager(include_defaults=True).all_tasks)


def evaluated(subject: Any, tasks: Sequence[str], templated: bool) -> dict[str, dict[str, float]]:
    """Return the metrics of a model of the harness on each task by the harness's names (`acc`, ...), and `questions`,
    their number.

    `tasks` are names, or absolute paths of task files. `templated`: questions are turns of the model's chat template.
    """
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        subject,
        tasks=list(tasks),
        task_manager=manager(include_defaults=not all(Path(task).is_absolute() for task in tasks)),
        log_samples=False,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=templated,
    )
    return {task: _numbers(metrics, found["n-samples"].get(task)) for task, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any], samples: dict[str, int] | None) -> dict[str, float]:
    plain = {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not name.startswith(("alias", "sample_len"))
    }
    return plain if samples is None else plain | {"questions": samples["effective"]}


def main() -> None:
    """Answer a request, as the module describes."""
    request, answer = map(Path, sys.argv[1:])
    wanted = json.loads(request.read_text(encoding="utf-8"))
    if "model" in wanted:
        from lm_eval.models.vllm_causallms import VLLM

        subject = VLLM(pretrained=wanted["model"], dtype=wanted["dtype"], **wanted["arguments"])
        found: dict[str, Any] = evaluated(subject, wanted["tasks"], wanted["templated"])
    else:
        missing = [name for name in NEEDED if find_spec(name) is None]
        found = {"missing": missing, "known": [] if "lm_eval" in missing else known_tasks()}
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

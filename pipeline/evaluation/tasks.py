"""Benchmark tasks of the LM Evaluation Harness (extra `eval`), by name or as local task files.

They run in this process, or in vLLM by a Python of its own (`evaluate.task_backend=vllm`).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluation import harness

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Tasks:
    """Tasks by name or file, and what computes them."""

    names: Sequence[str]
    templated: bool = False  # questions are turns of the model's chat template
    batch_size: int = 1  # of transformers
    backend: str = "transformers"  # in this process, or vllm
    python: str = sys.executable  # that has vllm and lm_eval
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the harness's vLLM model


def installed() -> bool:
    """Return whether the harness can be imported here."""
    return find_spec("lm_eval") is not None


def check(tasks: Tasks) -> None:
    """Raise ValueError for tasks that cannot run: a package or a task file is missing, or a name is unknown."""
    if not tasks.names:
        return
    for task in tasks.names:
        if is_file(task) and not Path(task).is_file():
            raise ValueError(f"evaluate.tasks: the task file {task} does not exist; correct the path")
    named = [task for task in tasks.names if not is_file(task)]
    if tasks.backend == "vllm":
        check_names(named, _known_elsewhere(tasks.python))
        return
    if not installed():
        raise ValueError(
            f"evaluate.tasks: {list(tasks.names)} needs the package lm_eval, which is missing; "
            "install the extra: pip install '.[eval]'"
        )
    if named:
        check_names(named, harness.known_tasks())


def check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for tasks that are not among the known ones, with those that have a similar name."""
    unknown = [task for task in tasks if task not in known]
    if unknown:
        near = [name for task in unknown for name in get_close_matches(task, known, n=3)]
        remedy = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists the known ones"
        raise ValueError(f"evaluate.tasks: the installed lm_eval has no {unknown}; {remedy}")


def check_form(tasks: Tasks, folder: Path) -> None:
    """Raise ValueError for a student in its own form where vLLM is to measure it on tasks."""
    if tasks.names and tasks.backend == "vllm" and "pruned" in _config(folder):
        raise ValueError(
            "evaluate.task_backend: vllm does not load a student whose layers differ in its own form; set "
            "export.form=decilm or padded, or evaluate.task_backend=transformers"
        )


def measure(tasks: Tasks, model: torch.nn.Module, tokenizer: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of each task of a model, which is loaded and lies in `folder`; see `harness.evaluated`."""
    if not tasks.names:
        return {}
    wanted = [str(Path(task).absolute()) if is_file(task) else task for task in tasks.names]
    if tasks.backend == "transformers":
        from lm_eval.models.huggingface import HFLM

        subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=tasks.batch_size)
        return harness.evaluated(subject, wanted, tasks.templated)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    own_code = "auto_map" in _config(folder)  # a folder of the pipeline has its code, or code that the user trusts
    arguments = {"trust_remote_code": own_code} | dict(tasks.arguments)
    request = {"model": str(folder.resolve()), "dtype": dtype, "arguments": arguments}
    return _answer(tasks.python, request | {"tasks": wanted, "templated": tasks.templated})


def is_file(task: str) -> bool:
    """Return whether a task is a file of its own rather than a name of the harness."""
    return task.endswith((".yaml", ".yml"))


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@cache
def _known_elsewhere(python: str) -> Sequence[str]:
    """Return the tasks that another Python's harness knows; ValueError where it lacks a package."""
    found = _answer(python, {})
    if found["missing"]:
        raise ValueError(
            f"evaluate.vllm_python: {python} has no {' and no '.join(found['missing'])}; install vllm and lm_eval "
            "together in an environment, and give its Python"
        )
    return found["known"]


def _answer(python: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what harness.py answers to a request in another Python; ValueError, with its output kept, where it fails.

    The program does not see that this process is a rank of a job.
    """
    own = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    with tempfile.TemporaryDirectory() as scratch:
        question, reply = Path(scratch, "request.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps(request), encoding="utf-8")
        command = [python, "-I", harness.__file__, str(question), str(reply)]
        try:
            done = subprocess.run(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ValueError(f"evaluate.vllm_python: {python} cannot be run: {error.strerror}") from error
        if done.returncode == 0:
            return json.loads(reply.read_text(encoding="utf-8"))
    with tempfile.NamedTemporaryFile(prefix="lm_eval-vllm-", suffix=".log", delete=False) as log:
        log.write(done.stdout)
    last = done.stdout.decode(errors="replace").strip().rpartition("\n")[2]
    raise ValueError(f"evaluate.task_backend: lm_eval with vLLM failed: {last}; its output is in {log.name}")

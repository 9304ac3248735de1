"""vLLM gives transformers' greedy tokens and log-probabilities for every form of student that it loads."""

import json

import pytest
import torch

from pipeline.evaluation import tasks
from pipeline.evaluation.tasks import Tasks
from pipeline.runtime.model_loader import load_model, load_tokenizer
from tests.questions import ACCURACY, own_task
from tests.serving import engines
from tests.serving.reference import NEW, agreement, prompts, sentences
from tests.serving.students import VOCABULARY, differing, exported, lacking

TOLERANCE = 2e-3  # of a log-probability, in float32
STUDENTS = {  # kind, form and plan of each; None: a layer removed, the others alike
    "llama": ("llama", "auto", None),
    "qwen3": ("qwen3", "auto", None),
    "llama-decilm": ("llama", "decilm", differing()),
    "llama-decilm-no_op": ("llama", "decilm", lacking()),
    "llama-padded": ("llama", "padded", differing()),
    "gemma3_text": ("gemma3_text", "auto", None),
    "gemma3_text-scaled": ("gemma3_text-scaled", "auto", None),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder of every student and what vLLM answers, by name: one process loads them all."""
    engines.python_of("vllm")
    scratch = tmp_path_factory.mktemp("vllm")
    folders = {}
    for name, (kind, form, plans) in STUDENTS.items():
        (scratch / name).mkdir()
        folders[name] = exported(scratch / name, kind, form, plans)
    given = [request(folder, prompts(VOCABULARY)) for folder in folders.values()]
    found = engines.answers("vllm", given, scratch)
    return {name: (folder, answer) for (name, folder), answer in zip(folders.items(), found, strict=True)}


def request(folder, given):
    coded = (folder / "configuration_decilm.py").is_file()
    return {"model": str(folder), "prompts": given, "new": NEW, "code": coded}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_what_transformers_computes(name, served, record):
    folder, answers = served[name]
    found = agreement(folder, prompts(VOCABULARY), answers)
    record("vllm", name, found, weights="f32", **{"class": architecture(folder)})
    assert found.equal == found.tokens and found.difference < TOLERANCE


def test_a_given_student(given_student, tmp_path, record):
    given = sentences(given_student)
    (answers,) = engines.answers("vllm", [request(given_student, given)], tmp_path)
    found = agreement(given_student, given, answers)
    record("vllm", "given", found, weights="f32", **{"class": architecture(given_student)})
    assert found.equal == found.tokens and found.difference < TOLERANCE


def test_tasks_of_the_harness_are_measured_by_vllm(tmp_path, monkeypatch):
    """In the environment of vLLM: of four questions whose answers are the model's own, but for one, three are right."""
    for name, value in engines.VLLM.items():
        monkeypatch.setenv(name, value)
    folder = exported(tmp_path, *STUDENTS["llama"])
    model = load_model(folder, torch.float32, "eager")
    tokenizer = load_tokenizer(folder)
    own = {"python": str(engines.python_of("vllm")), "arguments": {"enforce_eager": True}}
    wanted = Tasks([str(own_task(tmp_path, model, tokenizer))], backend="vllm", **own)
    tasks.check(wanted)
    found = tasks.measure(wanted, model, tokenizer, folder)
    assert (found["own"]["acc"], found["own"]["questions"]) == (ACCURACY, 4)


def architecture(folder):
    return json.loads((folder / "config.json").read_text())["architectures"][0]

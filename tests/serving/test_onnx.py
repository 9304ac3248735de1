"""ONNX Runtime GenAI gives transformers' greedy tokens and log-probabilities for what its model builder writes."""

import subprocess

import pytest

from pipeline.runtime.checkpoint import open_checkpoint
from tests.serving import engines
from tests.serving.reference import NEW, agreement, prompts, sentences
from tests.serving.students import VOCABULARY, differing, exported
from tests.tiny_text import byte_tokenizer

TOLERANCE = 2e-3  # of a log-probability, in float32
STUDENTS = {  # kind, form and plan of each; None: a layer removed, the others alike
    "llama": ("llama", "auto", None),
    "llama-padded": ("llama", "padded", differing()),
    "mistral": ("mistral", "auto", None),
    "qwen2": ("qwen2", "auto", None),
    "qwen3": ("qwen3", "auto", None),
    "gemma": ("gemma", "auto", None),
    "gemma2": ("gemma2", "auto", None),
}


def built(folder, scratch):
    """Return the folder that the model builder writes of a student: one command."""
    command = [engines.python_of("onnx"), "-m", "onnxruntime_genai.models.builder", "-i", folder]
    options = ["-o", scratch / "onnx", "-p", "fp32", "-e", "cpu", "-c", scratch / "cache"]
    done = subprocess.run(
        list(map(str, [*command, *options])),
        env=engines.environment(scratch),
        cwd=scratch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return scratch / "onnx"


def architecture(folder):
    return open_checkpoint(folder).config["architectures"][0]


def compare(folder, scratch, given):
    request = {"model": str(built(folder, scratch)), "prompts": given, "new": NEW}
    (answers,) = engines.answers("onnx", [request], scratch)
    return agreement(folder, given, answers)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_what_transformers_computes(name, tmp_path, record):
    engines.python_of("onnx")
    folder = exported(tmp_path, *STUDENTS[name])
    (folder / "tokenizer.model").unlink()
    byte_tokenizer().save_pretrained(folder)  # the engine refuses special tokens beyond the vocabulary of the model
    found = compare(folder, tmp_path, prompts(VOCABULARY))
    record("onnx", name, found, weights="f32", **{"class": architecture(folder)})
    assert found.equal == found.tokens and found.difference < TOLERANCE


def test_a_given_student(given_student, tmp_path, record):
    engines.python_of("onnx")
    found = compare(given_student, tmp_path, sentences(given_student))
    record("onnx", "given", found, weights="f32", **{"class": architecture(given_student)})
    assert found.equal == found.tokens and found.difference < TOLERANCE

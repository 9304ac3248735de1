"""llama.cpp gives transformers' greedy tokens and log-probabilities for every model type that stage gguf accepts."""

import pytest

from pipeline.model.gguf_form import GRAPHS
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.gguf_converter import convert
from tests.serving import engines
from tests.serving.reference import NEW, agreement, prompts, sentences
from tests.serving.students import CHANGED, VOCABULARY, converted, differing, exported, model_type

# Largest difference of a log-probability, by the type of the weights. llama.cpp rounds GELU to 16 bits, hence not less.
TOLERANCE = {"f32": 3e-2, "f16": 5e-2, "bf16": 0.3, "q8_0": 0.5}
SCALED = tuple(kind for kind in CHANGED if kind.endswith("-scaled"))
FORMS = {"llama-padded": ("llama", "padded", differing())}


def compare(folder, weights, scratch, given=None):
    """Convert a student, and return how llama.cpp agrees with transformers on it."""
    file, record = converted(folder, weights, engines.converter(), scratch / weights)
    given = given or prompts(VOCABULARY)
    request = {"model": str(file), "prompts": given, "new": NEW}
    (found,) = engines.answers("llama_cpp", [request], scratch)
    return agreement(folder, given, found), record


def check(found, weights):
    assert found.difference < TOLERANCE[weights]
    if weights in ("f32", "f16"):
        assert found.equal == found.tokens


@pytest.mark.parametrize("kind", [*GRAPHS, *SCALED, *FORMS])
def test_a_student_without_a_layer_is_what_transformers_computes(kind, tmp_path, record):
    engines.python_of("llama_cpp"), engines.converter()
    model, form, plans = FORMS.get(kind, (kind, "auto", None))
    folder = exported(tmp_path, model, form, plans)
    found, written = compare(folder, "f32", tmp_path)
    record("llama_cpp", kind, found, weights="f32", **{"class": open_checkpoint(folder).config["architectures"][0]})
    check(found, "f32")
    graph = GRAPHS[model_type(model)]
    assert written.windows == graph.windows and (written.query_factor != 1.0) == kind.endswith("-scaled")


@pytest.mark.parametrize("kind", ["gemma2-scaled", "gemma3_text", "gemma3_text-scaled"])
def test_the_converter_alone_writes_another_model(kind, tmp_path, record):
    """Without what stage gguf adapts, llama.cpp reads the file without an error and computes something else."""
    engines.python_of("llama_cpp")
    folder, file = exported(tmp_path, kind, "auto"), tmp_path / "alone.gguf"
    convert(engines.converter(), folder, "f32", file, 1.0, print)
    given = prompts(VOCABULARY)
    (found,) = engines.answers("llama_cpp", [{"model": str(file), "prompts": given, "new": NEW}], tmp_path)
    found = agreement(folder, given, found)
    architecture = open_checkpoint(folder).config["architectures"][0]
    record("llama_cpp", f"{kind}_unadapted", found, weights="f32", **{"class": architecture})
    assert found.difference > 10 * TOLERANCE["f32"]


@pytest.mark.parametrize("weights", ["f16", "bf16", "q8_0"])
def test_other_types_of_weights(weights, tmp_path, record):
    engines.python_of("llama_cpp"), engines.converter()
    found, written = compare(exported(tmp_path, "llama", "auto"), weights, tmp_path)
    record("llama_cpp", f"llama_{weights}", found, weights=weights, **{"class": "LlamaForCausalLM"})
    check(found, weights)
    assert written.tensors[weights.upper()] >= 7 * 7


@pytest.mark.parametrize("weights", ["f32", "f16", "q8_0"])
def test_a_given_student(weights, given_student, tmp_path, record):
    engines.python_of("llama_cpp")
    found, _ = compare(given_student, weights, tmp_path, sentences(given_student))
    architecture = open_checkpoint(given_student).config["architectures"][0]
    record("llama_cpp", f"given_{weights}", found, weights=weights, **{"class": architecture})
    check(found, weights)

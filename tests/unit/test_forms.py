"""Laws of the export forms: students whose layers differ, padded or in the DeciLM form, are the same function."""

import json

import pytest
import torch

from pipeline.model import decilm
from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan
from pipeline.model.forms import padded
from pipeline.model.settings import student_config
from pipeline.prune.pad import pad
from pipeline.prune.surgery import cut
from pipeline.runtime import configuration_decilm, decilm_reader
from pipeline.runtime.checkpoint import load_model, open_checkpoint, write_checkpoint
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens

MIXED = (
    LayerPlan(0, (Group(0, 0, (0, 1)),), tuple(range(24))),
    LayerPlan(1, (Group(1, 0, (0,)), Group(1, 1, (3,))), tuple(range(8))),
    LayerPlan(2, (Group(2, 1, (2, 3)),), tuple(range(16))),
    LayerPlan(3, (Group(3, 1, (2,)),), tuple(range(3, 24))),
)
CACHE = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
SERVED = ("llama", "llama-biases", "llama-tied", "mistral", "qwen2")


@pytest.fixture(autouse=True)
def _code_of_checkpoints_is_cached_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(CACHE, str(tmp_path / "modules"))


def assert_close(one, other):
    """Equal up to the float32 in which the classes' norms and softmax compute, even inside a float64 model."""
    assert (one - other).norm() / other.norm() < 1e-6, (one - other).abs().max()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def student(kind, folder, plans=MIXED, channels=32, **changed):
    """Write the student of a tiny model as the line keeps it, and give its checkpoint."""
    model = tiny_model(kind, **changed)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    blueprint = Blueprint(tuple(range(channels)), plans)
    config = student_config(config_of(model), anatomy, blueprint)
    write_checkpoint(folder, config, cut(anatomy, blueprint, tensors_of(model)), 1e9)
    return open_checkpoint(folder)


def exported(form, source, folder):
    config, wide = form(source.config, source.anatomy)
    write_checkpoint(folder, config, pad(source.anatomy, wide, source.items()), 1e9)
    return folder


def served(source, folder):
    exported(decilm.decilm, source, folder)
    with open(configuration_decilm.__file__) as code:
        (folder / decilm.CONFIGURATION_FILE).write_text(code.read())
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_a_padded_student_is_the_same_function_in_the_stock_class(kind, tmp_path):
    source = student(kind, tmp_path / "s")
    folder = exported(padded, source, tmp_path / "p")
    assert not {"pruned", "auto_map"} & json.loads((folder / "config.json").read_text()).keys()
    model = load_model(folder, torch.float64, "eager")
    assert type(model).__name__ == CLASSES[kind][1]
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 24)
    assert_close(logits(model), logits(load_model(source.folder, torch.float64, "eager")))


@pytest.mark.parametrize("kind", SERVED)
def test_the_decilm_form_is_the_same_function_to_a_reader_of_its_rules_and_to_our_loader(kind, tmp_path):
    source = student(kind, tmp_path / "s")
    folder = served(source, tmp_path / "d")
    wanted = logits(load_model(source.folder, torch.float64, "eager"))
    read = [decilm_reader.logits(folder, ids.tolist(), torch.float64) for ids in tokens()]
    assert_close(torch.stack(read), wanted)
    assert_close(logits(load_model(folder, torch.float64, "eager")), wanted)

"""The mapping between a class's parameters and checkpoint tensors is exact in both directions, for every type."""

import pytest
import torch

from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.class_parameters import ClassParameters, stored_tensors
from pipeline.runtime.model_class import class_of
from tests.mixtures import MIXTURES
from tests.tiny import save_tiny, tiny_model


@pytest.mark.parametrize("kind", [*MIXTURES, "llama-tied", "gpt_neox"])
def test_parameters_are_assembled_and_split_bit_for_bit(kind, tmp_path):
    model = tiny_model(kind, dtype=torch.float32)
    origin = open_checkpoint(save_tiny(model, tmp_path))
    parameters = ClassParameters(class_of(origin.config, origin.folder), origin)
    assert all(torch.equal(parameters[name], value) for name, value in model.named_parameters())
    doubled = ((name, 2.0 * value.detach()) for name, value in model.named_parameters())
    stored = dict(stored_tensors(parameters, doubled))
    assert all(torch.equal(value, 2.0 * origin[name]) for name, value in stored.items())
    buffers = {name for name in origin if name.endswith(("_bias", "layer_scalar"))}
    assert {name for name in origin if name not in stored} <= buffers
    assert "model.unheard_of" not in parameters

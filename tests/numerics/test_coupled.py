"""Laws of coupled structures: every weight is counted once, in the structure it goes with."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import everything
from pipeline.prune.importance.coupled import coupled
from pipeline.prune.importance.magnitude import magnitude
from pipeline.prune.surgery.cut import cut
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model

OUTSIDE = ("o_proj.bias", "down_proj.bias")


@pytest.mark.parametrize("kind", CLASSES)
def test_magnitudes_of_all_structures_add_up_to_that_of_the_weights(kind):
    model = tiny_model(kind)
    source = tensors_of(model)
    heads, neurons, _ = magnitude(anatomy_of(config_of(model), source), source)
    of_heads = ("_proj", "q_norm", "k_norm") if kind == "olmo2" else ("_proj",)  # there gains run over all heads
    for layer in range(4):
        own = {n: t for n, t in source.items() if n.startswith(f"model.layers.{layer}.") and not n.endswith(OUTSIDE)}
        attention = sum(t.abs().sum() for n, t in own.items() if "attn" in n and any(part in n for part in of_heads))
        ffn = sum(t.abs().sum() for n, t in own.items() if "mlp" in n and "_proj" in n)
        torch.testing.assert_close(heads[layer].sum(), attention)
        torch.testing.assert_close(neurons[layer].sum(), ffn)


def test_what_a_cut_takes_away_is_what_its_structures_weighed():
    """Ones in place of weights: the sums count the weights that leave with a KV group and with a neuron."""
    model = tiny_model("llama")
    source = tensors_of(model)
    anatomy = anatomy_of(config_of(model), source)
    heads, neurons, _ = coupled(anatomy, lambda name: torch.ones_like(source[name]))
    whole = everything(anatomy.sizes)
    first = whole.layers[0]
    thin = type(first)(0, first.groups[:1], first.neurons[:-1])
    student = dict(cut(anatomy, type(whole)(whole.channels, (thin, *whole.layers[1:])), source))
    gone = sum(t.numel() for t in source.values()) - sum(t.numel() for t in student.values())
    assert gone == int(heads[0][2:].sum() + neurons[0][-1])

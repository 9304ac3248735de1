"""Laws of the FFN of a layer as a module of its own, for every type with a table, in float64."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.causal import decoder_of
from pipeline.prune.passes.layerwise import in_step
from tests.tiny import TINY, config_of, family, tensors_of, tiny_model, tokens

HERE = torch.device("cpu")


def lessons(kind):
    """Yield the lesson of each layer of a model that is its own teacher."""
    model = tiny_model(kind)
    known = (decoder_of(model), anatomy_of(config_of(model), tensors_of(model)))
    layers = len(known[1].sizes.layers)
    return in_step(known, known, range(layers), range(32), [tokens(), tokens(1, 7, seed=1)], HERE)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in TINY if not family(kind).residual_weights])
def test_the_stream_without_the_ffn_and_what_its_branch_adds_are_the_stream_after_the_layer(kind):
    seen = 0
    for lesson in lessons(kind):
        if lesson.branch is None:
            assert kind == "nemotron_h"  # some of whose layers are attention or a state-space model alone
            torch.testing.assert_close(lesson.base, lesson.wanted)
        else:
            seen += 1
            added = lesson.branch(lesson.read)
            torch.testing.assert_close(lesson.base + added, lesson.wanted, rtol=1e-5, atol=1e-6)
            assert added.norm() > 1e-3 * lesson.wanted.norm()
            assert any(weight.dim() > 1 for weight in lesson.branch.parameters())
            own = {
                name.partition(".")[0] for name, weight in lesson.branch.layer.named_parameters() if weight.dim() > 1
            }
            assert not any("attn" in name or "attention" in name for name in own), own
    assert seen


@torch.no_grad()
def test_a_branch_that_became_float32_is_computed_in_the_types_of_its_class():
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    gate.weight = torch.nn.Parameter(gate.weight.float())  # which some classes keep in float32
    known = (decoder_of(model), anatomy_of(config_of(model), tensors_of(model)))
    branch = list(in_step(known, known, range(4), range(32), [tokens()], HERE))[1].branch
    types = {name: weight.dtype for name, weight in branch.float().computed().items()}
    assert {weight.dtype for weight in branch.parameters()} == {torch.float32}
    assert types.pop("layer.mlp.gate.weight") == torch.float32 and set(types.values()) == {torch.bfloat16}

"""Laws of the Gram matrices: the plain products, ranks, subsets of layers, the stream's directions."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.prune.second_order.hessian import CHUNK, add_products, gram
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens
from tests.watching import inputs_of


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def grams_of(model, *batches, layers=range(4), stream=True):
    return gram(model.model, anatomy(model), batches, layers, stream=stream)


@pytest.mark.parametrize("kind", CLASSES)
def test_grams_are_the_products_of_what_the_projections_read(kind):
    model, ids = tiny_model(kind), tokens(3, 10)
    grams = grams_of(model, ids[:2], ids[2:])
    assert len(grams.inputs) == 8
    for name, rows in inputs_of(model, ids, grams.inputs).items():
        torch.testing.assert_close(grams.inputs[name], rows.T @ rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_stream_is_summed_over_pre_norms_and_the_final_norm_at_unit_rms(kind):
    model, ids = tiny_model(kind), tokens(2, 10)
    names = [f"model.layers.{i}.{n}" for i in range(4) for n in anatomy(model).family.pre_norms] + ["model.norm"]
    rows = torch.cat(list(inputs_of(model, ids, names).values()))
    unit = rows / (rows.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    grams = grams_of(model, ids)
    torch.testing.assert_close(grams.stream, unit.T @ unit, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grams.final, unit[-20:].T @ unit[-20:], rtol=1e-6, atol=1e-6)
    assert grams.stream.trace() == pytest.approx(32 * 20 * 9, rel=1e-3)


def test_grams_of_two_ranks_add_to_the_grams_of_one():
    model, ids = tiny_model("qwen3"), tokens(4, 8)
    parts = [grams_of(model, part).tensors() for part in (ids[0::2], ids[1::2])]
    for one, other, total in zip(*parts, grams_of(model, ids).tensors(), strict=True):
        torch.testing.assert_close(one + other, total, rtol=1e-6, atol=1e-6)


def test_passes_over_subsets_of_layers_give_what_one_pass_gives():
    model, ids = tiny_model("llama"), tokens()
    whole = grams_of(model, ids)
    some = [grams_of(model, ids, layers=layers, stream=False) for layers in ((0, 3), (1,), (2,))]
    assert all(part.stream is None and part.final is None for part in some)
    together = {name: total for part in some for name, total in part.inputs.items()}
    assert together.keys() == whole.inputs.keys()
    assert all(torch.equal(together[name], total) for name, total in whole.inputs.items())


def test_a_narrow_dtype_is_multiplied_in_float32_and_added_in_float64():
    rows = torch.randn(3 * CHUNK, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = rows.to(torch.float64).T @ rows.to(torch.float64)
    total = torch.zeros(8, 8, dtype=torch.float64)
    add_products(total, rows.unflatten(0, (CHUNK, 3)))
    assert (total - exact).abs().max() < 1e-5 * exact.abs().max()

"""Laws of fluctuation: FLAP's formula, standardisation, and biases that keep mean outputs."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.hf_config import student_config
from pipeline.prune.importance.fluctuation import (
    biased_anatomy,
    biased_config,
    compensate_biases,
    fluctuation,
    moments,
    standardised,
)
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.second_order.restore import restore_outputs
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import load_model, write_checkpoint
from tests.numerics.test_gram import inputs_of
from tests.tiny import config_of, tensors_of, tiny_model, tokens


def parts(kind):
    model = tiny_model(kind)
    return model, anatomy_of(config_of(model), tensors_of(model)), tensors_of(model)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_scores_are_variance_times_column_norm(kind):
    model, anatomy, source = parts(kind)
    heads, neurons = fluctuation(anatomy, source, moments(model.model, anatomy, [tokens()[:1], tokens()[1:]]))
    names = ["model.layers.3.self_attn.o_proj", "model.layers.3.mlp.down_proj"]
    read = inputs_of(model, tokens(), names)
    o, down = (read[n].var(0, correction=0) * source[f"{n}.weight"].norm(dim=0) ** 2 for n in names)
    torch.testing.assert_close(heads[3], o.view(4, 8).mean(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(neurons[3], down, rtol=1e-5, atol=1e-7)


def test_padding_counts_for_nothing_and_ranks_add():
    model, anatomy, _ = parts("llama")
    ids = tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    padded = moments(model.model, anatomy, [(ids, mask)])
    parts_of_it = [moments(model.model, anatomy, [part]).tensors() for part in (ids[:1], ids[1:, :6])]
    for one, other, total in zip(*parts_of_it, padded.tensors(), strict=True):
        torch.testing.assert_close(one + other, total, rtol=1e-5, atol=1e-6)


def test_standardised_scores_compare_across_layers_and_keep_their_order():
    layers = [torch.rand(20, dtype=torch.float64) * 10**i for i in range(4)]
    for before, after in zip(layers, standardised(layers)):
        assert abs(after.mean()) < 1e-12 and after.std(correction=0) == pytest.approx(1.0)
        assert torch.equal(before.argsort(), after.argsort())
    assert torch.equal(standardised([torch.full((3,), 7.0)])[0], torch.zeros(3))


def narrow(last):
    """Everything but the last layer, which is narrowed: what it reads does not change."""
    whole = everything(last.sizes).layers
    return Blueprint(tuple(range(32)), (*whole[:3], LayerPlan(3, (Group(3, 1, (2, 3)),), tuple(range(3, 24, 2)))))


@pytest.mark.parametrize("kind", ["llama", "llama-biases"])
@pytest.mark.parametrize("restored", [False, True])
def test_a_compensated_projection_writes_the_mean_it_wrote(kind, restored, tmp_path):
    model, anatomy, source = parts(kind)
    blueprint = narrow(anatomy)
    stream = cut(anatomy, blueprint, source)
    if restored:
        grams = gram(model.model, anatomy, [tokens()], range(4), stream=False).inputs
        stream = restore_outputs(anatomy, blueprint, source, grams, stream)
    means = moments(model.model, anatomy, [tokens()]).means()
    stream = compensate_biases(anatomy, blueprint, source, means, stream)
    config = student_config(biased_config(config_of(model)), biased_anatomy(anatomy), blueprint)
    write_checkpoint(tmp_path, config, stream, 1e9)
    student = load_model(tmp_path, torch.float64, "eager")
    name = "model.layers.3.self_attn.o_proj"
    outputs = []
    for each in (model, student):
        with torch.no_grad():
            outputs.append(each.get_submodule(name)(inputs_of(each, tokens(), [name])[name]))
    torch.testing.assert_close(outputs[0].mean(0), outputs[1].mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_keeping_everything_changes_no_bias_and_adds_zeros():
    for kind in ("llama", "llama-biases"):
        model, anatomy, source = parts(kind)
        whole = everything(anatomy.sizes)
        means = moments(model.model, anatomy, [tokens()]).means()
        result = dict(compensate_biases(anatomy, whole, source, means, cut(anatomy, whole, source)))
        assert result.keys() == biased_anatomy(anatomy).shapes().keys()
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, source.get(name, torch.zeros_like(tensor)), rtol=0, atol=1e-12)


def test_channels_that_go_take_their_bias_along():
    model, anatomy, source = parts("llama")
    means = moments(model.model, anatomy, [tokens()]).means()
    whole, some = narrow(anatomy), Blueprint(tuple(range(1, 32, 2)), narrow(anatomy).layers)
    biases = [
        dict(compensate_biases(anatomy, b, source, means, cut(anatomy, b, source)))["model.layers.3.mlp.down_proj.bias"]
        for b in (whole, some)
    ]
    torch.testing.assert_close(biases[0][1::2], biases[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "glm"])
def test_a_class_without_such_biases_is_refused(kind):
    _, anatomy, _ = parts(kind)
    with pytest.raises(ValueError, match=r"no .*mlp.down_proj.bias to put mean outputs into"):
        biased_anatomy(anatomy)

"""Laws of fluctuation: FLAP's formula, standardisation, and biases that keep mean outputs."""

from dataclasses import replace

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.hf_config import student_config
from pipeline.model.scores import Scores
from pipeline.prune.importance import SCORES
from pipeline.prune.importance.measure import measure
from pipeline.prune.importance.moments import moments
from pipeline.prune.importance.score import Measured, standardised
from pipeline.prune.plan import shuffled
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.second_order.restore import restore_outputs
from pipeline.prune.surgery.bias import biased_anatomy, biased_config, compensate_biases
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.tiny import config_of, tensors_of, tiny_model, tokens
from tests.watching import inputs_of


def parts(kind):
    model = tiny_model(kind)
    return model, anatomy_of(config_of(model), tensors_of(model)), tensors_of(model)


def scores_of(model, anatomy, source, kind, batches):
    """Return the scores of one kind; those of channels and layers are of no interest here."""
    plain = measure(model.model, anatomy, [tokens()]).scores()
    measured = Measured(plain, moments(model.model, anatomy, batches))
    return plain.with_units(*SCORES[kind].compute(anatomy, source, measured))


def channel_scores(model, source, name):
    """FLAP's formula for the channels that one projection reads, [tokens, channels] -> [channels]."""
    read = inputs_of(model, tokens(), [name])[name]
    columns = source[f"{name}.weight"].double()
    return torch.stack([x.var(correction=0) * (w @ w) for x, w in zip(read.double().T, columns.T, strict=True)])


ORDERS = ("fluctuation", "fluctuation_of_heads")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_scores_are_variance_times_column_norm(kind, order):
    model, anatomy, source = parts(kind)
    scores = scores_of(model, anatomy, source, order, [tokens()[:1], tokens()[1:]])
    o, down = (channel_scores(model, source, f"model.layers.3.{n}") for n in ("self_attn.o_proj", "mlp.down_proj"))
    o = o.square() if order == "fluctuation" else o  # as in FLAP's code
    torch.testing.assert_close(scores.heads[3], o.view(4, 8).mean(1), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(scores.neurons[3], down, rtol=1e-5, atol=1e-7)


def standard(values, correction):
    return (values - values.mean()) / values.std(correction=correction)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3]])
def test_flap_standardises_channels_and_then_averages_those_of_a_head(layers):
    model, anatomy, source = parts("llama")
    scores = scores_of(model, anatomy, source, "fluctuation", [tokens()])
    heads, neurons = standardised(scores, layers)
    means, _ = standardised(scores_of(model, anatomy, source, "fluctuation_of_heads", [tokens()]), layers)
    for place, layer in enumerate(layers):
        o = channel_scores(model, source, f"model.layers.{layer}.self_attn.o_proj")
        down = channel_scores(model, source, f"model.layers.{layer}.mlp.down_proj")
        torch.testing.assert_close(heads[place], standard(o.square(), 1).view(4, 8).mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(neurons[place], standard(down, 1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(means[place], standard(o.view(4, 8).mean(1), 0), rtol=1e-5, atol=1e-6)
        assert heads[place].std(correction=0) < 0.9, "the means of a head's channels vary less than its channels"


@pytest.mark.parametrize("kinds", [(), ("heads",), ("neurons",), ("heads", "neurons")])
def test_random_heads_and_neurons_are_compared_by_deviations_of_their_own(kinds):
    model, anatomy, source = parts("llama")
    scores = scores_of(model, anatomy, source, "fluctuation", [tokens()])
    before, after = (standardised(each, range(4)) for each in (scores, shuffled(scores, kinds, 0)))
    for kind, one, other in zip(("heads", "neurons"), before, after, strict=True):
        for layer in range(4):
            if kind in kinds:
                assert float(other[layer].std(correction=0)) == pytest.approx(1.0)
            else:
                assert torch.equal(one[layer], other[layer])


def test_deviations_are_saved_with_the_scores(tmp_path):
    scores = scores_of(*parts("llama"), "fluctuation", [tokens()])
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert torch.equal(loaded.deviations, scores.deviations) and scores.deviations.shape == (2, 4)
    assert replace(scores, deviations=None).with_units(scores.heads, scores.neurons).deviations is None


def test_moments_of_ranks_add():
    model, anatomy, _ = parts("llama")
    ids = tokens(2, 10)
    ranks = [moments(model.model, anatomy, [part]).tensors() for part in (ids[:1], ids[1:])]
    for one, other, total in zip(*ranks, moments(model.model, anatomy, [ids]).tensors(), strict=True):
        torch.testing.assert_close(one + other, total, rtol=1e-5, atol=1e-6)


def test_standardised_scores_compare_across_layers_and_keep_their_order():
    layers = tuple(torch.rand(20, dtype=torch.float64) * 10**i for i in range(4))
    scores = Scores(torch.ones(8), layers, (torch.full((3,), 7.0),) * 4, torch.ones(4), 1)
    heads, neurons = standardised(scores, range(4))
    for before, after in zip(layers, heads, strict=True):
        assert abs(after.mean()) < 1e-12 and after.std(correction=0) == pytest.approx(1.0)
        assert torch.equal(before.argsort(), after.argsort())
    assert torch.equal(neurons[0], torch.zeros(3))


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


def test_a_family_whose_projections_are_all_kept_has_no_biases_to_compensate_with():
    model = tiny_model("glm_moe_dsa")
    with pytest.raises(ValueError, match=r"^reinit\.bias_compensation: .*has no W_O and W_down to put mean outputs in"):
        biased_anatomy(anatomy_of(config_of(model), tensors_of(model)))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "glm"])
def test_a_class_without_such_biases_is_refused(kind):
    _, anatomy, _ = parts(kind)
    with pytest.raises(ValueError, match=r"no .*mlp.down_proj.bias to put mean outputs into"):
        biased_anatomy(anatomy)

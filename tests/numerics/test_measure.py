"""Laws of the scores: the formulas of Pangu Light eq. 1-4 against their plain reading, masks, ranks, memory."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.prune.importance.measure import inverse_rms, measure
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def seen(model, ids, mask=None):
    """Everything eq. 1-4 are about, recorded plainly: norm outputs, W_O and W_down inputs, block inputs and outputs."""
    record = {"norms": [], "heads": [], "neurons": [], "blocks": []}
    hooks = []
    family = anatomy(model).family
    names = [*family.pre_norms, *family.post_norms]
    for layer in model.model.layers:
        for name in names:
            hooks.append(layer.get_submodule(name).register_forward_hook(lambda m, i, o: record["norms"].append(o)))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda m, i: record["heads"].append(i[0])))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda m, i: record["neurons"].append(i[0])))
        hooks.append(layer.register_forward_hook(lambda m, i, o: record["blocks"].append((i[0], o))))
    hooks.append(model.model.norm.register_forward_hook(lambda m, i, o: record["norms"].append(o)))
    with torch.no_grad():
        model.model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return record


@pytest.mark.parametrize("kind", CLASSES)
def test_scores_are_the_papers_formulas(kind):
    model, ids = tiny_model(kind), tokens(3, 10)
    record = seen(model, ids)
    scores = measure(model.model, anatomy(model), [ids[:2], ids[2:]]).scores()
    assert scores.tokens == 30
    torch.testing.assert_close(scores.channels, sum(x.abs().sum((0, 1)) for x in record["norms"]), rtol=1e-6, atol=1e-6)
    for layer in range(4):
        heads = record["heads"][layer].unflatten(-1, (4, 8)).norm(dim=-1).sum((0, 1))
        torch.testing.assert_close(scores.heads[layer], heads, rtol=1e-6, atol=1e-6)
        neurons = record["neurons"][layer].abs().sum((0, 1))
        torch.testing.assert_close(scores.neurons[layer], neurons, rtol=1e-6, atol=1e-6)
        before, after = record["blocks"][layer]
        influence = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
        torch.testing.assert_close(scores.layers[layer], influence, rtol=1e-5, atol=1e-6)


def test_minitron_aggregation_is_l2_over_the_batch_of_means_over_the_sequence():
    model, ids = tiny_model("llama"), tokens(3, 10)
    record = seen(model, ids)
    scores = measure(model.model, anatomy(model), [ids[:1], ids[1:]], "minitron").scores()
    wanted = record["neurons"][2].abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(scores.neurons[2], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["sum", "minitron"])
def test_padding_counts_for_nothing(aggregation):
    model, ids = tiny_model("llama"), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    short = [ids[:1], ids[1:, :6]]
    padded = measure(model.model, anatomy(model), [(ids, mask)], aggregation).scores()
    plain = measure(model.model, anatomy(model), short, aggregation).scores()
    assert padded.tokens == plain.tokens == 16
    for (name, one), (_, other) in zip(padded.items(), plain.items(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_scores_of_two_ranks_are_the_scores_of_one():
    model, ids = tiny_model("qwen3"), tokens(4, 8)
    whole = measure(model.model, anatomy(model), [ids])
    parts = [measure(model.model, anatomy(model), [part]) for part in (ids[0::2], ids[1::2])]
    for one, other, total in zip(parts[0].tensors(), parts[1].tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(one + other, total, rtol=1e-6, atol=1e-6)


def test_norms_pre_leaves_post_norms_out():
    model, ids = tiny_model("glm4"), tokens(2, 6)
    every = measure(model.model, anatomy(model), [ids], norms="all").scores().channels
    before = measure(model.model, anatomy(model), [ids], norms="pre").scores().channels
    assert (every > before).all()


def test_an_empty_pass_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="score.tokens"):
        measure(model.model, anatomy(model), []).scores()


def test_inverse_rms_is_the_mean_of_inverses():
    model, ids = tiny_model("glm4"), tokens(2, 6)
    name = "model.layers.1.post_mlp_layernorm"
    inputs = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, i: inputs.append(i[0]))
    total, count = inverse_rms(model.model, [name], [ids[:1], ids[1:]])[name]
    hook.remove()
    wanted = torch.cat(inputs).square().mean(-1).add(model.config.rms_norm_eps).rsqrt().mean()
    torch.testing.assert_close(total / count, wanted, rtol=1e-5, atol=0)

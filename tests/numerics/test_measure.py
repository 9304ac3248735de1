"""Laws of the scores: the formulas of Pangu Light eq. 1-4 against their plain reading, aggregations, ranks."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.prune.importance.measure import AGGREGATIONS, inverse_rms, measure
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def seen(model, ids):
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
        model.model(input_ids=ids)
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


@pytest.mark.parametrize("aggregation", ["sum", "minitron"])
def test_norms_whose_class_puts_all_tokens_in_one_dimension_are_scored_by_sequence(aggregation):
    model, ids = tiny_model("gemma4_text-experts"), tokens(3, 10)
    model.set_experts_implementation("eager")
    flat, wanted = {}, torch.zeros(6, 3, 32, dtype=torch.float64)  # [layer, sequence, channel]
    for layer, block in enumerate(model.model.layers):
        block.router.norm.register_forward_hook(lambda m, i, o, layer=layer: flat.__setitem__(layer, o))
    found = measure(model.model, anatomy(model), [ids], aggregation)
    for layer, output in flat.items():
        assert output.shape == (30, 32)
        wanted[layer] = output.abs().view(3, 10, 32).sum(1)
    total = wanted.sum(1) if aggregation == "sum" else (wanted / 10).square().sum(1)
    rows = [row for row in found.channels if any(torch.allclose(row, each, rtol=1e-9) for each in total)]
    assert len(rows) == 6 and (found.channels.std(1) > 0).all()


@pytest.mark.parametrize("kind", ["llama", "glm4", "gemma3_text", "olmo2"])
def test_minitron_takes_the_l2_norm_over_sequences_of_the_mean_over_the_sequence_of_every_norm_by_itself(kind):
    """Plain loops over norms, sequences and channels in float64; channels are summed over norms afterwards."""
    model, ids = tiny_model(kind), tokens(3, 10)
    record = seen(model, ids)
    scores = measure(model.model, anatomy(model), [ids[:1], ids[1:]], "minitron").scores()

    def l2_of_means(values):  # [batch, sequence, width]
        means = [sequence.double().abs().sum(0) / len(sequence) for sequence in values]
        return sum(mean**2 for mean in means) ** 0.5

    channels = sum(l2_of_means(norm) for norm in record["norms"])
    torch.testing.assert_close(scores.channels, channels, rtol=1e-6, atol=1e-6)
    for layer in range(4):
        heads = l2_of_means(record["heads"][layer].unflatten(-1, (4, 8)).norm(dim=-1))
        torch.testing.assert_close(scores.heads[layer], heads, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scores.neurons[layer], l2_of_means(record["neurons"][layer]), rtol=1e-6, atol=1e-6)
    together = sum(x.abs().mean(1).square().sum(0) for x in record["norms"]).sqrt()
    assert not torch.allclose(scores.channels, together, rtol=0.1), "one root over all norms is another score"


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("groups", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_scores_do_not_depend_on_how_sequences_are_grouped_into_batches_and_ranks(aggregation, groups):
    model, ids = tiny_model("llama"), tokens(5, 8)
    whole = measure(model.model, anatomy(model), [ids], aggregation).scores()
    batches = measure(model.model, anatomy(model), ids.split(groups), aggregation).scores()
    ranks = [measure(model.model, anatomy(model), [part], aggregation) for part in ids.split(groups)]
    for sums in ranks[1:]:
        for total, part in zip(ranks[0].tensors(), sums.tensors(), strict=True):
            total += part
    for other in (batches, ranks[0].scores()):
        for (name, one), (_, two) in zip(whole.items(), other.items(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("setting, value", [("aggregation", "mean"), ("norms", "post")])
def test_an_unknown_aggregation_or_choice_of_norms_is_refused(setting, value):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"score.{setting}: .*{value}"):
        measure(model.model, anatomy(model), [tokens()], **{setting: value})


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

"""Laws of the restoration of narrowed experts, in float64: what Gram matrices are, and that no error rises."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import everything
from pipeline.model.causal import decoder_of
from pipeline.model.hf_config import student_config
from pipeline.prune.passes.experts import expert_output, watch_experts
from pipeline.prune.second_order.experts import expert_grams, narrowed_parts, restore_experts
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint_writer import write_checkpoint
from tests.mixtures import loaded, sent_to
from tests.tiny import config_of, tensors_of, tiny_model, tokens

# By kind: neurons of a routed expert and of the shared ones (None: all, or there are none)
KINDS = {
    "qwen3_moe": (7, None),
    "mixtral": (9, None),
    "gpt_oss": (5, None),
    "granitemoe": (7, None),
    "aria_text": (12, 12),
    "qwen2_moe": (7, 9),
    "llama4_text": (10, 10),
    "deepseek_v3": (6, None),
    "hunyuan_v1_moe": (10, 10),
}
EXPERTS = (0, 2, 3)


def parts(kind):
    model = tiny_model(kind)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    return model, anatomy, narrowed_parts(anatomy, True, True)


def narrow(anatomy, inner, shared, experts=EXPERTS):
    """Return a plan of fewer experts with other neurons each, and fewer neurons of shared ones."""
    draw = torch.Generator().manual_seed(3)

    def some(count, most):
        return tuple(sorted(torch.randperm(most, generator=draw)[:count].tolist()))

    whole, carried = everything(anatomy.sizes), anatomy.sizes.carried
    layers = [
        replace(
            plan,
            experts=experts,
            expert_neurons=tuple(some(inner, carried["x"]) for _ in experts),
            shared=some(shared, carried["y"]) if shared else (),
        )
        if anatomy.sparse(plan.host)
        else plan
        for plan in whole.layers
    ]
    return replace(whole, layers=tuple(layers))


def read(model, anatomy, ids):
    """Return, by layer and expert, the states [t, h] of the tokens that are sent to an expert, and by layer those that
    the shared experts read."""
    routed, shared, layers = {}, {}, [i for i in range(4) if anatomy.sparse(i)]
    modules = {layer: model.get_submodule(anatomy.expert_module(layer)) for layer in layers}
    with ExitStack() as undo:
        for layer, module in modules.items():
            undo.callback(
                module.register_forward_pre_hook(lambda _, seen, layer=layer: routed.update({layer: seen})).remove
            )
            if anatomy.shared_writer:
                parent = model.get_submodule(anatomy.shared_writer.format(layer=layer).rpartition(".")[0])
                hook = parent.register_forward_pre_hook(lambda _, seen, layer=layer: shared.update({layer: seen[0]}))
                undo.callback(hook.remove)
        decoder_of(model)(ids, use_cache=False)
    sent = {
        (layer, expert): sent_to(expert, anatomy.sizes.carried["e"], *inputs)[0]
        for layer, inputs in routed.items()
        for expert in range(anatomy.sizes.carried["e"])
    }
    return sent, {layer: states.flatten(0, -2) for layer, states in shared.items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_grams_are_the_products_of_what_w_down_of_each_expert_reads(kind):
    model, anatomy, watched = parts(kind)
    ids = tokens(3, 10)
    grams = expert_grams(decoder_of(model), anatomy, [ids[:2], ids[2:]], watched)
    sent, _ = read(model, anatomy, ids)
    assert set(grams) == {part.name for part in watched} and any(len(states) for states in sent.values())
    for part in watched:
        if part.expert is not None:
            module = model.get_submodule(anatomy.expert_module(part.layer))
            rows, _ = expert_output(module, part.expert, sent[part.layer, part.expert])
            torch.testing.assert_close(grams[part.name], rows.T @ rows, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_restoration_never_raises_the_error_of_an_expert_on_its_tokens(kind, tmp_path):
    model, anatomy, watched = parts(kind)
    ids = tokens(8, 16)
    blueprint = narrow(anatomy, *KINDS[kind])
    grams = expert_grams(decoder_of(model), anatomy, [ids], watched)
    config, source = student_config(config_of(model), anatomy, blueprint), tensors_of(model)
    streams = {
        "cut": cut(anatomy, blueprint, source),
        "restored": restore_experts(anatomy, blueprint, source, grams, cut(anatomy, blueprint, source)),
    }
    students = {}
    for name, stream in streams.items():
        write_checkpoint(tmp_path / name, config, stream, 1e9)
        students[name] = loaded(tmp_path / name)
    sent, shared = read(model, anatomy, ids)
    errors = {name: [] for name in students}
    for layer in (plan.host for plan in blueprint.layers if plan.experts):
        for place, expert in enumerate(EXPERTS):
            states, wholes = sent[layer, expert], model.get_submodule(anatomy.expert_module(layer))
            wanted = expert_output(wholes, expert, states)[1]
            for name, student in students.items():
                module = student.get_submodule(anatomy.expert_module(layer))
                errors[name].append(float((expert_output(module, place, states)[1] - wanted).square().sum()))
        if blueprint.layers[layer].shared:
            name_of = anatomy.shared_writer.format(layer=layer).rpartition(".")[0]
            wanted = model.get_submodule(name_of)(shared[layer])
            for name, student in students.items():
                errors[name].append(float((student.get_submodule(name_of)(shared[layer]) - wanted).square().sum()))
    for before, after in zip(errors["cut"], errors["restored"], strict=True):
        assert after <= before * (1 + 1e-6)
    assert sum(errors["restored"]) < 0.9 * sum(errors["cut"])
    changed = {name for name, tensor in tensors_of(students["cut"]).items()
               if not torch.equal(tensor, tensors_of(students["restored"])[name])}  # fmt: skip
    writers = {f"{anatomy.shared_writer}.weight".format(layer=layer) for layer in range(4)}
    student = blueprint.student(anatomy)
    assert changed <= writers | {name.format(layer=layer) for name in student.expert_writers for layer in range(4)}


@torch.no_grad()
def test_parts_of_the_text_and_of_the_experts_add_to_the_whole():
    model, anatomy, watched = parts("deepseek_v3")
    ids = tokens(4, 8)
    whole = expert_grams(model.model, anatomy, [ids], watched)
    ranks = [expert_grams(model.model, anatomy, [part], watched) for part in ids.split(2)]
    apart = [expert_grams(model.model, anatomy, [ids], [part]) for part in watched]
    for name, matrix in whole.items():
        torch.testing.assert_close(ranks[0][name] + ranks[1][name], matrix, rtol=1e-6, atol=1e-7)
    for part, found in zip(watched, apart, strict=True):
        torch.testing.assert_close(found[part.name], whole[part.name], rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_an_expert_without_tokens_stays_as_it_was_cut_and_a_missing_matrix_is_named():
    model, anatomy, watched = parts("mixtral")
    blueprint, source = narrow(anatomy, 9, None), tensors_of(model)
    grams = {part.name: torch.zeros(part.width, part.width, dtype=torch.float64) for part in watched}
    for name, tensor in restore_experts(anatomy, blueprint, source, grams, cut(anatomy, blueprint, source)):
        assert torch.equal(tensor, dict(cut(anatomy, blueprint, source))[name])
    with pytest.raises(ValueError, match=r"mlp\.experts\.0"):
        list(restore_experts(anatomy, blueprint, source, {}, cut(anatomy, blueprint, source)))


@torch.no_grad()
def test_what_is_watched_is_computed_as_the_class_computes_it():
    model, anatomy, _ = parts("qwen2_moe")
    wanted = model(tokens()).logits
    with ExitStack() as undo:
        watch_experts(model.model, anatomy, {1: lambda *_: None, 3: lambda *_: None}, undo)
        torch.testing.assert_close(model(tokens()).logits, wanted)
    assert torch.equal(model(tokens()).logits, wanted)

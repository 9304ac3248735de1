"""Laws of re-initialisation: SLNP, gain compensation, post-norm absorption and its exact folding."""

from dataclasses import replace

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.hf_config import folded_config, student_config, with_scales
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.reinit import (
    absorb_post_norms,
    compensate_gain,
    fold_scales,
    post_norm_modules,
    stabilise_gains,
)
from pipeline.runtime.checkpoint import read_config
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens


def parts(kind, **changed):
    model = tiny_model(kind, **changed)
    return model, anatomy_of(config_of(model), tensors_of(model)), tensors_of(model)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("kind", CLASSES)
def test_slnp_keeps_the_l2_norm_of_every_effective_gain(kind):
    model, anatomy, source = parts(kind, num_attention_heads=2, num_key_value_heads=1)
    channels = tuple(range(0, 32, 2))
    blueprint = Blueprint(channels, everything(anatomy.sizes).layers)
    stream = stabilise_gains(anatomy, blueprint, source, cut(anatomy, blueprint, source))
    offset = anatomy.family.norm_offset
    found = 0
    # a tied Gemma head takes the embedding's sqrt(h'/h) back in the final gain, on top of SLNP
    tied_scale = 0.5**0.5 if anatomy.family.embedding_times_root_hidden and anatomy.tied else 1.0
    for name, tensor in stream:
        if name.endswith("norm.weight") and "self_attn." not in name:
            scale = tied_scale if name == "model.norm.weight" else 1.0
            wanted = (source[name] + offset).norm() * scale
            assert torch.isclose((tensor + offset).norm(), wanted, rtol=1e-12), name
            found += 1
        elif tensor.shape == source[name].shape:
            assert torch.equal(tensor, source[name])
    assert found == 4 * len({*anatomy.family.pre_norms, *anatomy.family.post_norms}) + 1


def test_clap_with_a_silent_host_and_compensated_gains_reproduces_the_donor(tmp_path):
    """The host's own attention writes nothing and its FFN neither; taking the donor's heads gives the donor layer."""
    model, anatomy, source = parts("llama")
    full = tuple(range(24))
    donated = tuple(Group(2, kv, (2 * kv, 2 * kv + 1)) for kv in range(2))
    blueprint = Blueprint(tuple(range(32)), (everything(anatomy.sizes).layers[0], LayerPlan(1, donated, full)))
    folder = tmp_path / "s"
    stream = cut(anatomy, blueprint, source, compensate_gain(anatomy, source))
    write_checkpoint(folder, student_config(config_of(model), anatomy, blueprint), stream, 1e9)
    student = load_model(folder, torch.float64, "eager")
    with torch.no_grad():
        x = torch.randn(1, 5, 32, dtype=torch.float64)
        angles = model.model.rotary_emb(x, torch.arange(5)[None])
        wanted = model.model.layers[2].self_attn(model.model.layers[2].input_layernorm(x), angles, None)[0]
        host = student.model.layers[1]
        got = host.self_attn(host.input_layernorm(x), angles, None)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_host_gain_of_zero_cannot_be_compensated():
    _, anatomy, source = parts("llama")
    source["model.layers.1.input_layernorm.weight"][3] = 0.0
    donate = compensate_gain(anatomy, source)
    with pytest.raises(ValueError, match="reinit.gain_compensation"):
        donate("model.layers.{layer}.self_attn.q_proj.weight", torch.zeros(8, 32), 2, 1)


def frozen(kind, folder):
    """A sandwich-norm model with absorbed post-norms, saved and reloaded by the pruned class."""
    model, anatomy, source = parts(kind)
    means = {name: 0.5 + i / 10 for i, name in enumerate(post_norm_modules(anatomy))}
    config = with_scales(config_of(model) | {"architectures": [type(model).__name__]}, anatomy)
    write_checkpoint(folder, config, absorb_post_norms(anatomy, source, means), 1e9)
    return model, anatomy, means, load_model(folder, torch.float64, "eager")


@pytest.mark.parametrize("kind", ["glm4", "gemma2", "gemma3_text"])
def test_an_absorbed_post_norm_is_its_gain_times_s_without_the_norm(kind, tmp_path):
    model, anatomy, means, student = frozen(kind, tmp_path / "f")
    name, s = next(iter(means.items()))
    gain = model.get_submodule(name).weight + anatomy.family.norm_offset
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(student.get_submodule(name)(x), x * gain * s, rtol=1e-12, atol=0)
    assert student.get_submodule(name).weight.requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_glm4_with_frozen_post_norms_equals_glm_with_folded_weights(tmp_path, bias):
    model, anatomy, means, student = frozen("glm4", tmp_path / "f")
    state = dict(student.state_dict())

    if bias:  # no GLM-4 has one in W_O; Llama-shaped sandwich models do, so the fold must scale biases too
        name = "model.layers.0.self_attn.o_proj"
        x, b = torch.randn(3, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
        widened = {**state, f"{name}.bias": b}
        wide = replace(anatomy, optional=anatomy.optional | {"self_attn.o_proj.bias"})
        biased = {n: widened.get(n, torch.zeros(32, dtype=torch.float64)) for n in wide.shapes()}
        folded = dict(fold_scales(wide, biased))
        scale = state["model.layers.0.post_self_attn_layernorm.weight"]
        got = x @ folded[f"{name}.weight"].T + folded[f"{name}.bias"]
        torch.testing.assert_close(got, (x @ state[f"{name}.weight"].T + b) * scale, rtol=1e-12, atol=1e-12)
        return
    config = folded_config(read_config(tmp_path / "f"), anatomy)
    write_checkpoint(tmp_path / "g", config, fold_scales(anatomy, state), 1e9)
    glm = load_model(tmp_path / "g", torch.float64, "eager")
    assert type(glm).__name__ == "GlmForCausalLM"
    torch.testing.assert_close(logits(glm), logits(student), rtol=1e-5, atol=1e-6)


def test_a_family_without_a_class_for_folded_post_norms_says_so():
    model, anatomy, _ = parts("gemma3_text")
    with pytest.raises(ValueError, match="no class without post-norms"):
        folded_config(config_of(model), anatomy)

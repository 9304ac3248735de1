"""What the operations mean: Hugging Face's modules, autograd and PyTorch's attention say the same as the references."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, scaled_dot_product_attention
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama

import fused
from fused import ascend, reference, sdpa
from pipeline.distill.loss import linear_distillation

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


@pytest.mark.parametrize("norm,offset", [(modeling_llama.LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_rms_norm_is_the_families_norm(norm, offset):
    module = norm(24, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(reference.rms_norm(x, module.weight, 1e-5, offset), module(x))


def test_add_rms_norm_is_an_addition_and_a_norm():
    x, residual, gain = random(4, 24), random(4, 24), random(24)
    normalised, total = reference.add_rms_norm(x, residual, gain, 1e-6, 0.0)
    assert torch.equal(total, x + residual)
    assert torch.equal(normalised, reference.rms_norm(x + residual, gain, 1e-6, 0.0))


def test_a_static_scale_folds_into_the_matrix_before_it():
    x, matrix, scale = random(5, 16), random(24, 16), random(24)
    folded = x @ (matrix * scale[:, None]).T
    torch.testing.assert_close(reference.static_scale(x @ matrix.T, scale), folded)


def test_packed_swiglu_is_glm4s_feed_forward():
    config = modeling_glm4.Glm4Config(hidden_size=16, intermediate_size=24)
    module = modeling_glm4.Glm4MLP(config)
    x = torch.randn(3, 16)
    torch.testing.assert_close(module.down_proj(reference.swiglu_packed(module.gate_up_proj(x))), module(x))


def test_rotary_half_is_llamas_and_interleave_glm4s():
    query, angle = torch.randn(2, 4, 5, 16), torch.rand(2, 5, 8) * 6
    half, woven = (torch.cat((angle, angle), -1), angle.repeat_interleave(2, -1))
    expected, _ = modeling_llama.apply_rotary_pos_emb(query, query, half.cos(), half.sin())
    torch.testing.assert_close(reference.rotary(query, half.cos(), half.sin(), "half"), expected)
    expected, _ = modeling_glm4.apply_rotary_pos_emb(query, query, half.cos(), half.sin())
    torch.testing.assert_close(reference.rotary(query, woven.cos(), woven.sin(), "interleave"), expected)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_the_gradient_in_place_is_autograds(kind):
    student, teacher, temperature, beta, scale = 3 * random(6, 20), 3 * random(6, 20), 1.7, 0.3, 0.2
    leaf = student.clone().requires_grad_()
    log_q, log_p = log_softmax(leaf / temperature, -1), log_softmax(teacher / temperature, -1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    expected = {
        "forward_kl": kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
        "reverse_kl": kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1),
        "jsd": beta * kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
        + (1 - beta) * kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1),
    }[kind]
    loss = reference.kl_of_logits(student, teacher, kind, temperature, beta, scale)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(student, torch.autograd.grad(scale * expected.sum(), leaf)[0])


@pytest.mark.parametrize("kind", reference.KINDS)
def test_chunks_of_logits_and_the_kernel_are_the_pipelines_loss(kind):
    """linear_distillation equals: logits, kl_of_logits with scale T²/t, and the products of its gradient."""
    tokens, temperature = 5, 1.7
    hidden, weight = random(tokens, 8).requires_grad_(), random(20, 8).requires_grad_()
    teacher_hidden, teacher_weight = random(tokens, 12), random(20, 12)
    loss, _ = linear_distillation(
        hidden, weight, teacher_hidden, teacher_weight, kind=kind, beta=0.3, temperature=temperature,
        cross_entropy=0.0, labels=None, chunk=2, kernel="autograd",
    )  # fmt: skip
    logits, teacher = (hidden @ weight.T).detach(), teacher_hidden @ teacher_weight.T
    ours = reference.kl_of_logits(logits, teacher, kind, temperature, 0.3, temperature**2 / tokens)
    torch.testing.assert_close(ours.mean() * temperature**2, loss.detach())
    expected = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(logits @ weight.detach(), expected[0])
    torch.testing.assert_close(logits.T @ hidden.detach(), expected[1])


def test_what_the_divergence_is_not_defined_on_is_refused():
    x = torch.randn(2, 5)
    refused = {
        "require a gradient": (x.clone().requires_grad_(), x, "jsd", 1.0, 0.5),
        "tokens, vocabulary": (x, x[:1], "jsd", 1.0, 0.5),
        "kind is kl": (x, x, "kl", 1.0, 0.5),
        "temperature is 0": (x, x, "jsd", 0.0, 0.5),
        "beta is 1": (x, x, "jsd", 1.0, 1.0),
    }
    for line, arguments in refused.items():
        with pytest.raises(ValueError, match=line):
            reference.kl_of_logits(*arguments, scale=1.0)


def heads(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    return random(2, 6, queries, 8), random(2, 3, keys, 8), random(2, 3, keys, 8)


@pytest.mark.parametrize("queries,keys", [(7, 7), (1, 7), (4, 7)])
def test_every_query_sees_what_lies_before_it(queries, keys):
    """The last queries of a full causal attention, computed alone, are what they were in full."""
    query, key, value = heads(keys, keys)
    full = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.4, enable_gqa=True)
    for module in (reference, sdpa):
        ours = module.attention(query[:, :, -queries:], key, value, 0.4, True, None)
        torch.testing.assert_close(ours, full[:, :, -queries:])


@pytest.mark.parametrize("shape", [(4, 7), (2, 1, 4, 7), (2, 6, 4, 7), (2, 1, 1, 7)])
def test_a_mask_hides_where_it_is_true(shape):
    query, key, value = heads(4, 7)
    masked = torch.rand(shape) < 0.4
    masked[..., 0] = False
    ours = reference.attention(query, key, value, 0.4, False, masked)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=~masked, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(sdpa.attention(query, key, value, 0.4, False, masked), expected)


def hidden_by(arguments: dict) -> torch.Tensor:
    """bool [b or 1, n or 1, s, t]: what npu_fusion_attention hides, given its arguments, after its documentation.

    sparse_mode 0 wants the mask in full. 2 and 3 want the 2048 x 2048 template, of which the corner (2), or the corner
    shifted so that the last query sees the last key (3), stands for the whole.
    """
    length, keys = arguments["query"].shape[2], arguments["key"].shape[2]
    mask, mode = arguments.get("atten_mask"), arguments.get("sparse_mode", 0)
    if mask is None:
        return torch.zeros(1, 1, length, keys, dtype=torch.bool)
    assert mask.dtype is torch.bool and mask.is_contiguous()
    if mode == 0:
        assert mask.shape[-2:] == (length, keys)
        return mask.expand(2, arguments["head_num"], length, keys)
    assert mask.shape == (2048, 2048) and mode in (2, 3)
    shift = keys - length if mode == 3 else 0
    return mask[shift : shift + length, :keys][None, None]


@pytest.mark.parametrize("queries,keys", [(7, 7), (1, 7), (4, 7)])
@pytest.mark.parametrize("form", ["causal", "masked", "row", "free"])
def test_npu_fusion_attention_is_asked_for_the_reference(form, queries, keys):
    query, key, value = heads(queries, keys)
    masked = {"masked": torch.rand(2, 1, queries, keys) < 0.4, "row": torch.rand(2, 1, 1, keys) < 0.4}.get(form)
    if masked is not None:
        masked[..., 0] = False
    arguments = ascend.fusion_arguments(query, key, value, 0.4, form == "causal", masked)
    assert arguments["input_layout"] == "BNSD" and arguments["head_num"] == query.shape[1]
    ours = scaled_dot_product_attention(
        arguments["query"], arguments["key"], arguments["value"], attn_mask=~hidden_by(arguments),
        scale=arguments["scale"], enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(ours, reference.attention(query, key, value, 0.4, form == "causal", masked))


def test_attention_that_cannot_be_meant_is_refused():
    query, key, value = heads(4, 7)
    refused = {
        "6 query heads for 4 KV heads": (query, random(2, 4, 7, 8), value, 1.0, False, None),
        "causal and a mask": (query, key, value, 1.0, True, torch.zeros(4, 7, dtype=torch.bool)),
        "8 queries for 7 keys": (random(2, 6, 8, 8), key, value, 1.0, True, None),
        "dtype torch.float64": (query, key, value, 1.0, False, random(4, 7)),
    }
    for line, arguments in refused.items():
        for module in (reference, sdpa, ascend):
            with pytest.raises(ValueError, match=line):
                module.attention(*arguments)


@pytest.mark.parametrize("name", fused.DEFAULT)
def test_every_operation_has_a_reference_and_runs_by_default_on_a_cpu(name):
    assert fused.op(name, "cpu", "reference") is getattr(reference, name)
    assert fused.op(name, "cpu").__name__ == name


def test_a_choice_that_cannot_run_is_an_error_and_never_another_choice(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for arguments, line in {
        ("gelu", "cpu"): "kernel gelu is unknown",
        ("swiglu", "tpu"): "no implementation for device tpu",
        ("swiglu", "cpu", "liger"): "implementation liger is unknown",
        ("swiglu", "cpu", "sdpa"): "kernel swiglu has no sdpa implementation; choose reference",
        ("rms_norm", "cuda", "ascend"): "kernel rms_norm: ascend cannot run on cuda: .* use device npu",
        ("swiglu", "cpu", "triton"): "kernel swiglu: triton cannot run on cpu: .*; or choose reference",
    }.items():
        with pytest.raises(ValueError, match=line):
            fused.op(*arguments)

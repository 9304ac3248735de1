"""What the operations mean: Hugging Face's modules and autograd agree with the references."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama

import fused
from fused import reference
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
        ("rms_norm", "cuda", "ascend"): "kernel rms_norm: ascend cannot run on cuda: .* use device npu",
        ("swiglu", "cpu", "triton"): "kernel swiglu: triton cannot run on cpu: .*; or choose reference",
    }.items():
        with pytest.raises(ValueError, match=line):
            fused.op(*arguments)

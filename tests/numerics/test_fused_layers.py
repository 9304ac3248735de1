"""Layers computed by the operators of kernels/fused equal those of the stock class, for every family."""

from collections import Counter

import pytest
import torch

import fused
from fused import reference
from pipeline.model.causal import decoder_of
from pipeline.model.families import FAMILIES
from pipeline.model.forwards import replaced_forward
from pipeline.runtime.device import open_device
from pipeline.runtime.fused_layers import LAYER_OPERATORS, forwards_of, fused_layers, operators
from pipeline.runtime.layer_streaming import placed
from tests.tiny import CLASSES, tiny_model, tokens


def counted(names=LAYER_OPERATORS):
    """The references, counting their calls: in the place of an accelerator's operators."""
    calls = Counter()

    def of(name):
        def operator(*arguments):
            calls[name] += 1
            return getattr(reference, name)(*arguments)

        return operator

    return {name: of(name) for name in names}, calls


def run(model, ids):
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    return logits.detach(), {name: each.grad.clone() for name, each in model.named_parameters()}


def expected_calls(kind, model):
    """One call a norm, a FFN with SiLU, and one each for queries and keys of an attention."""
    family, layers = FAMILIES[model.config.model_type], len(model.base_model.layers)
    norms = sum(name.endswith("norm.weight") for name in family.layer)
    calls = {"rms_norm": layers * norms + 1, "rotary": 2 * layers}
    if not kind.startswith("gemma"):
        calls["swiglu_packed" if "mlp.gate_up_proj.weight" in family.layer else "swiglu"] = layers
    return calls


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_and_gradients_are_the_stock_class_s(kind, dtype):
    """Float64 within what the classes lose by computing their norms in float32."""
    model, ids = tiny_model(kind, dtype=dtype), tokens(2, 11)
    wanted, gradients = run(model, ids)
    chosen, calls = counted()
    with fused_layers(model, chosen):
        ours, own = run(model, ids)
    assert calls == expected_calls(kind, model)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(ours, wanted, **tolerance)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=tolerance["rtol"], atol=1e-4 * float(gradient.abs().max()))
    again, _ = run(model, ids)
    assert torch.equal(again, wanted) and calls == expected_calls(kind, model), "the stock forwards are restored"


@pytest.mark.parametrize("kind", ["glm", "phi3"])
def test_a_part_of_a_head_that_is_not_turned_passes(kind):
    model, ids = tiny_model(kind, partial_rotary_factor=0.5, dtype=torch.float32), tokens(1, 9)
    wanted, _ = run(model, ids)
    chosen, calls = counted(("rotary",))
    with fused_layers(model, chosen):
        torch.testing.assert_close(run(model, ids)[0], wanted, rtol=1e-4, atol=1e-5)
    assert calls["rotary"]


def test_only_the_model_at_hand_changes():
    """Neither the class nor its module: another model of the family computes as before."""
    model, other = tiny_model("llama"), tiny_model("llama")
    chosen, calls = counted()
    with fused_layers(model, chosen):
        other(tokens())
    assert not calls


def test_a_decoder_and_a_streamed_model_are_covered_and_hooks_run():
    chosen, calls = counted()
    model, ids = tiny_model("qwen3", dtype=torch.float32), tokens()
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    device = open_device("cpu", "auto", False, 0, 0)
    for stream in (False, True):
        calls.clear()
        with fused_layers(decoder_of(model), chosen), placed(decoder_of(model), device, stream) as decoder:
            decoder(input_ids=ids, use_cache=False)
        assert calls == expected_calls("qwen3", model)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("kernels", "device", "names"),
    [
        ("auto", "cpu", set()),
        ("reference", "cuda", set()),
        ("reference", "npu", set()),
    ],
)
def test_what_is_replaced_where(kernels, device, names):
    assert set(operators(kernels, device)) == names


def test_the_table_names_what_an_npu_and_a_gpu_replace():
    def own(device):
        return {name for name in LAYER_OPERATORS if fused.DEFAULT[name][device] != "reference"}

    assert own("npu") == {"rms_norm", "swiglu_packed", "rotary"} and own("cuda") == set(LAYER_OPERATORS)


def test_an_operator_that_cannot_run_is_refused_by_its_setting():
    with pytest.raises(ValueError, match="device.kernels.*torch_npu.*device.kernels=reference"):
        operators("auto", "npu")


def test_a_model_without_operators_is_left_alone():
    assert forwards_of(tiny_model("llama"), {}) == {}


def test_a_replaced_forward_comes_back_also_an_earlier_one_and_after_an_error():
    module = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    stock = module(x)
    with replaced_forward({module: lambda x: x + 1}):
        with pytest.raises(RuntimeError), replaced_forward({module: lambda x: x + 2}):
            assert torch.equal(module(x), x + 2)
            raise RuntimeError
        assert torch.equal(module(x), x + 1)
    assert torch.equal(module(x), stock) and "forward" not in vars(module)

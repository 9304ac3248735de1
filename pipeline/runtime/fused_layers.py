"""The operators of kernels/fused in place of the forwards of Hugging Face's layers, where the device has them.

Which module computes what is read from the family's table and the modules themselves: gains of RMSNorms, the
projections of a SwiGLU, the rotary embedding inside an attention. Parameters, names, hooks and classes are unchanged,
so a checkpoint written from such a model is the stock model's. docs/kernels.md says why this is not done through the
`kernels` distribution.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

import fused
from pipeline.model.causal import CausalModel
from pipeline.model.families import FAMILIES, Family
from pipeline.model.forwards import replaced_forward

Operators = Mapping[str, Callable[..., Any]]
LAYER_OPERATORS = ("rms_norm", "swiglu", "swiglu_packed", "rotary")
ROTARY = "apply_rotary_pos_emb"  # the function that Hugging Face's attentions call


@cache
def operators(kernels: str, device_type: str) -> dict[str, Callable[..., Any]]:
    """Return the operators that replace parts of a model on a device type, by name.

    `kernels`, the setting device.kernels: auto (those for which the table of kernels/fused names more than the
    reference) or reference (none: every layer is computed by its stock class). ValueError where one cannot run.
    """
    if kernels == "reference":
        return {}
    names = [name for name in LAYER_OPERATORS if fused.DEFAULT[name][device_type] != "reference"]
    try:
        return {name: fused.op(name, device_type) for name in names}
    except ValueError as error:
        raise ValueError(f"device.kernels: {error}; or set device.kernels=reference") from None


@contextmanager
def fused_layers(model: nn.Module, chosen: Operators) -> Iterator[None]:
    """Within the block, the layers of a causal model, or of its decoder, are computed by these operators."""
    with replaced_forward(forwards_of(model, chosen)):
        yield


def forwards_of(model: CausalModel, chosen: Operators) -> dict[nn.Module, Callable[..., Any]]:
    """Return the forward of every module that one of the operators can compute; none for a model without a table."""
    family = FAMILIES.get(model.config.model_type)
    if family is None or not chosen:
        return {}
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    body = _submodule(model, family.decoder) or model
    *_, stack = family.prefix.removesuffix(".{layer}.").rpartition(".")
    layers = getattr(body, stack)
    final = _submodule(body, family.final_norm.removeprefix(f"{family.decoder}."))
    parts = [(layer, name) for layer in layers for name in _norm_names(family)]
    norms = [_submodule(layer, name) for layer, name in parts]
    if "rms_norm" in chosen:
        for norm in (*norms, final):
            if norm is not None and type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "weight"):
                forwards[norm] = partial(_norm, chosen["rms_norm"], norm, _epsilon(norm), family.norm_offset)
    for layer in layers:
        ffn, attention = _submodule(layer, "mlp"), _submodule(layer, "self_attn")
        if ffn is not None and _is_silu(ffn):
            if "swiglu" in chosen and hasattr(ffn, "gate_proj"):
                forwards[ffn] = partial(_ffn, chosen["swiglu"], ffn)
            elif "swiglu_packed" in chosen and hasattr(ffn, "gate_up_proj"):
                forwards[ffn] = partial(_packed_ffn, chosen["swiglu_packed"], ffn)
        if "rotary" in chosen and attention is not None and family.rotary != "class":
            forward = inspect.unwrap(type(attention).forward)
            if ROTARY in forward.__globals__:
                turn = partial(_rotary, chosen["rotary"], family.rotary)
                forwards[attention] = MethodType(_rebound(forward, {ROTARY: turn}), attention)
    return forwards


def _norm(operator: Callable[..., Tensor], module: nn.Module, eps: float, offset: float, hidden: Tensor) -> Tensor:
    return operator(hidden, module.weight, eps, offset)


def _ffn(operator: Callable[..., Tensor], module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(operator(module.gate_proj(hidden), module.up_proj(hidden)))


def _packed_ffn(operator: Callable[..., Tensor], module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(operator(module.gate_up_proj(hidden)))


def _rotary(
    operator: Callable[..., Tensor], mode: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys [b, n, t, d] by cos and sin [b or 1, t, r], as Hugging Face's function of this name.

    Elements of a head beyond the first r are not turned. cos and sin hold every angle twice, one half after the other.
    """
    if mode == "interleave":
        cos, sin = (each[..., : each.shape[-1] // 2].repeat_interleave(2, dim=-1) for each in (cos, sin))
    size = cos.shape[-1]
    turned = []
    for heads in (q, k):
        first = operator(heads[..., :size], cos, sin, mode)
        turned.append(first if size == heads.shape[-1] else torch.cat((first, heads[..., size:]), dim=-1))
    return turned[0], turned[1]


def _rebound(function: FunctionType, names: Mapping[str, Any]) -> FunctionType:
    """Return a copy of a function that finds these names among its globals; its module is not changed."""
    copy = FunctionType(
        function.__code__,
        function.__globals__ | dict(names),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _norm_names(family: Family) -> list[str]:
    """Return the modules of a layer that have one gain a channel or head element: its norms."""
    gains = [name for name in family.layer if name.endswith("norm.weight")]
    return [name.removesuffix(".weight") for name in gains]


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    """Return a module of a layer, None where this layer has none of that name."""
    found: Any = layer
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _epsilon(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _is_silu(ffn: nn.Module) -> bool:
    """Return whether the activation of a gated FFN is SiLU, by the names Hugging Face's classes give it."""
    activation = getattr(ffn, "act_fn", getattr(ffn, "activation_fn", None))
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"

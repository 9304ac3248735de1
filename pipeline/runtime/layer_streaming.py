"""A model on a device that may be too small for it: whole where it fits, else moved there layer by layer."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Literal

from torch import Tensor, nn

from pipeline.model.causal import CausalModel
from pipeline.runtime.device import Device
from pipeline.runtime.disk import size
from pipeline.runtime.fused_layers import fused_layers, operators

SHARE = 0.75  # of the memory that is free, for weights: the rest is for what passes through them

Stream = Literal["auto"] | bool


@contextmanager
def placed(model: nn.Module, device: Device, stream: Stream) -> Iterator[nn.Module]:
    """Within the block, run forward passes of a causal model, or of its decoder, on the device; leave it there.

    Its layers are computed by the fused operators that `device.kernels` allows. A streamed model (`stream` true, or
    `auto` where it is too large) has on the device what is outside its layers; attention, FFN and norms of a layer are
    copied there from the host's tensors one after another, each while it runs. Nothing is copied back, and changes of
    weights between two passes apply to the host's tensors. Results equal the whole model's, bit for bit. Memory on the
    device: the model without its layers, and the largest part of one. Time: a copy of all layers a pass.
    """
    with fused_layers(model, operators(device.kernels, device.kind)), _moved(model, device, stream) as moved:
        yield moved


@contextmanager
def _moved(model: CausalModel, device: Device, stream: Stream) -> Iterator[CausalModel]:
    if stream is False or stream == "auto" and _fits(model, device):
        yield model.to(device.torch)
        return
    parts = [part for layer in model.base_model.layers for part in layer.children()]
    inside = {id(tensor) for part in parts for tensor in _tensors(part)}
    for tensor in _tensors(model):
        tensor.data = tensor.data.to("cpu" if id(tensor) in inside else device.torch)
    with ExitStack() as undo:
        for part in parts:
            _bring(part, device, undo)
        yield model


def need_memory(device: Device, needed: Mapping[str, float], what: str, remedy: str) -> None:
    """Raise ValueError where `what` needs more bytes, listed by purpose, than the device has."""
    if sum(needed.values()) > device.total_memory():
        parts = " + ".join(f"{size(int(count))} of {purpose}" for purpose, count in needed.items())
        raise ValueError(
            f"{what} needs {parts} on one device, which has {size(device.total_memory())}; {remedy}, or use devices "
            "with more memory"
        )


def _fits(model: nn.Module, device: Device) -> bool:
    absent = sum(tensor.nbytes for tensor in _tensors(model) if tensor.device != device.torch)
    return not absent or absent <= SHARE * device.free_memory()


def _bring(part: nn.Module, device: Device, undo: ExitStack) -> None:
    """Keep the tensors of a part of a layer on the device while it runs, until `undo`."""
    held = [(tensor, tensor.data) for tensor in _tensors(part)]

    def bring(*_) -> None:
        for tensor, host in held:
            tensor.data = host.to(device.torch, copy=True)

    def take_back(*_) -> None:
        for tensor, host in held:
            tensor.data = host

    undo.callback(part.register_forward_pre_hook(bring, prepend=True).remove)
    undo.callback(part.register_forward_hook(take_back, always_call=True).remove)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, each once, tied or not."""
    return chain(module.parameters(), module.buffers())

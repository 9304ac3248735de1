"""A model on a device that may be too small for it: whole where it fits, else its layers are brought as they run."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Literal

from torch import Tensor, nn

from pipeline.runtime.device import Device
from pipeline.runtime.disk import size

SHARE = 0.75  # of the memory that is free, for weights: the rest is for what passes through them

Stream = Literal["auto"] | bool


@contextmanager
def placed(model: nn.Module, device: Device, stream: Stream) -> Iterator[nn.Module]:
    """Let a causal model, or its decoder, make forward passes on the device while it lasts; stay where it then is.

    A model that is streamed (`stream` true, or `auto` where it is too large) has on the device what is outside its
    layers; attention, FFN and norms of a layer come there one after another, each while it runs. They are copied from
    the host's tensors, which the model has again at once: nothing is copied back, and what is done to weights between
    two passes is done to those. Every number is that of the whole model, bit for bit. Memory on the device: without the
    layers the model, and the largest part of one; time: a copy of all layers a pass.
    """
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
    """Raise ValueError where `what` needs more bytes, told by purpose, than the device has."""
    if sum(needed.values()) > device.total_memory():
        told = " + ".join(f"{size(int(count))} of {purpose}" for purpose, count in needed.items())
        raise ValueError(
            f"{what} needs {told} on one device, which has {size(device.total_memory())}; {remedy}, or take devices "
            "with more memory"
        )


def _fits(model: nn.Module, device: Device) -> bool:
    absent = sum(tensor.nbytes for tensor in _tensors(model) if tensor.device != device.torch)
    return not absent or absent <= SHARE * device.free_memory()


def _bring(part: nn.Module, device: Device, undo: ExitStack) -> None:
    """Let the tensors of a part of a layer be on the device while it runs, until `undo`."""
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
    """Give parameters and buffers, each once, tied or not."""
    return chain(module.parameters(), module.buffers())

"""The FFN of a layer, dense or of experts, as a module of its own: what it adds to the residual stream.

The parts of a layer are its submodules: those that hold FFN neurons or experts, and others with matrices, which mix
tokens (attention, state-space models, convolutions). A part that is silent returns zeros in the form in which its class
returns its output, so that the layer adds norms, multipliers and post-norms as it always does.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.forwards import replaced_forward

Form = int | None  # the length of the tuple that a module returns, its output first; None: it returns a tensor
Call = tuple[tuple, dict[str, Any]]  # the arguments of a layer after the hidden states


def ffn_parts(layer: nn.Module, anatomy: Anatomy, index: int) -> dict[str, nn.Module]:
    """Return the submodules of layer `index` that hold its FFN or experts, by name; none where it has lost its FFN."""
    wanted = {"f", "e", "x", "y"} if anatomy.routing else {"f"}  # FFN neurons; experts, and neurons of two kinds
    own = {
        name.removeprefix(anatomy.family.prefix).partition(".")[0]
        for name, segments in anatomy.layer_tensors.items()
        if wanted & {axis for segment in segments for axes in segment for axis in axes} and anatomy.has(name, index)
    }
    if anatomy.sparse(index):
        own.add(anatomy.family.expert_module.partition(".")[0])
    return {name: part for name, part in layer.named_children() if name in own}


def mixers(layer: nn.Module, ffn: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the submodules of a layer with matrices that are not those of its FFN, by name."""
    matrices = {name: any(each.dim() > 1 for each in part.parameters()) for name, part in layer.named_children()}
    return {name: part for name, part in layer.named_children() if matrices[name] and name not in ffn}


class Silent(nn.Module):
    """Stands in for a part of a layer: returns zeros, or the residual where the part is given it to add to."""

    def __init__(self, part: nn.Module, form: Form) -> None:
        super().__init__()
        self.call, self.form = signature(part.forward), form

    def forward(self, *inputs: Any, **named: Any) -> Any:
        given = self.call.bind(*inputs, **named).arguments
        hidden = next(iter(given.values()))
        nothing = given.get("residual", torch.zeros_like(hidden))
        return nothing if self.form is None else (nothing, *[None] * (self.form - 1))


class Branch(nn.Module):
    """Maps the stream [tokens, h] that the FFN of a layer reads to what the FFN adds to it, [tokens, h].

    It holds a copy of the layer in which other parts are silent, and the arguments that the model gives the layer. The
    layer adds to the stream in the stream's type; the difference is returned in float32 or wider, so that stream and
    difference add up to the layer's own output where the FFN follows the attention.
    """

    def __init__(self, layer: nn.Module, silent: Mapping[str, Silent], call: Call) -> None:
        super().__init__()
        self.layer = deepcopy(layer, {id(getattr(layer, name)): part for name, part in silent.items()})
        self.call = call
        self.types = {name: weight.dtype for name, weight in self.named_parameters()}  # that the class computes in

    def computed(self) -> dict[str, Tensor]:
        """Return the parameters, which may have become float32 since, in the types that the class computes in."""
        return {name: weight.to(self.types[name]) for name, weight in self.named_parameters()}

    def forward(self, stream: Tensor) -> Tensor:
        rest, named = self.call
        output = self.layer(stream[None], *rest, **named)
        wide = torch.promote_types(stream.dtype, torch.float32)
        return (output[0] if isinstance(output, tuple) else output)[0].to(wide) - stream.to(wide)


@contextmanager
def silenced(parts: Mapping[str, nn.Module], hidden: Tensor) -> Iterator[None]:
    """Make the FFN parts of a layer silent inside the context; `hidden` [.., h] is a stream like the one they read."""
    forms = {part: _form(part, hidden) for part in parts.values()}
    with replaced_forward({part: Silent(part, form).forward for part, form in forms.items()}):
        yield


@contextmanager
def observed(parts: Mapping[str, nn.Module], silent: Mapping[str, Silent]) -> Iterator[None]:
    """Set the forms of the silent modules that take the place of parts to those of what they return in the context."""

    def note(name: str, output: Any) -> None:
        silent[name].form = _length(output)

    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_hook(lambda _, __, output, name=name: note(name, output)).remove)
        yield


@torch.no_grad()
def _form(part: nn.Module, hidden: Tensor) -> Form:
    """Return the form of an FFN part's output, from one token of the stream."""
    if isinstance(part, nn.Linear):
        return None
    one = hidden[:1, :1]
    return _length(part(one, one) if "residual" in signature(part.forward).parameters else part(one))


def _length(output: Any) -> Form:
    return len(output) if isinstance(output, tuple) else None

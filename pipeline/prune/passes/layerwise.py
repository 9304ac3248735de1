"""A pass through a model layer by layer: the stream of every batch under way, and one layer at a time on the device."""

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.model.anatomy import Anatomy
from pipeline.model.families import Family, family_of
from pipeline.model.forwards import replaced_forward
from pipeline.prune.passes.branches import Branch, Silent, ffn_parts, mixers, observed, silenced


class Step:
    """One batch under way: its stream, and the other arguments that the model gives to each layer."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.passed: dict[str, Any] = {}  # what the layer before passes on beside the stream, by argument
        self.hidden: Tensor  # [batch, sequence, h], set by the first layer
        self.arguments: list[tuple[tuple, dict[str, Any]]] = []  # by layer

    def stand_in(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor | tuple[Tensor, None]:
        """Record the arguments that a layer is called with and return its input, as its class returns it."""
        if not self.arguments:
            self.hidden = hidden_states
        self.arguments.append((rest, named))
        return (hidden_states, None) if self.family.tuples else hidden_states

    def through(self, layer: nn.Module, index: int, place: torch.device) -> Tensor:
        """Return the output of a layer for the current stream."""
        rest, named = _moved(self.arguments[index], place)
        output = layer(self.hidden.to(place), *rest, **(named | self.passed))
        if self.family.passes_on:
            self.passed = {self.family.passes_on: output[1]}
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int, place: torch.device) -> None:
        """Run the stream through a layer, in place.

        A new tensor for every layer and batch fragments the heap between the layer's own allocations, which then holds
        twice the streams.
        """
        self.hidden.copy_(self.through(layer, index, place))

    def twin(self) -> "Step":
        """Return the same batch with a stream and shared keys of its own; the other arguments are the same objects."""
        other, own = copy(self), dict[int, UserDict]()
        other.hidden = self.hidden.clone()
        for _, named in self.arguments:
            own |= {id(value): copy(value) for value in named.values() if isinstance(value, UserDict)}
        other.arguments = [
            (rest, {name: own.get(id(value), value) for name, value in named.items()}) for rest, named in self.arguments
        ]
        return other


@torch.no_grad()
def recorded(model: nn.Module, layers: Sequence[nn.Module], batches: Iterable[Tensor]) -> list[Step]:
    """Run the model with stand-ins for its layers: embeddings, masks and rotations are its own, whatever the family.

    What the model gives its layers for a batch as it did for the one before, such as masks [batch, 1, sequence,
    sequence], is held once.
    """
    home = next(model.parameters()).device
    config: Any = model.config
    family = family_of(config.model_type)
    steps: list[Step] = []
    held: list[Tensor] = []
    for ids in batches:
        step = Step(family)
        with replaced_forward(dict.fromkeys(layers, step.stand_in)):
            model(input_ids=ids.to(home), use_cache=False)
        step.arguments, held = _held_once(step.arguments, held)
        steps.append(step)
    return steps


@dataclass(frozen=True)
class FfnTarget:
    """What the FFN of a layer of a student is to learn: that `base` + `branch`(`read`) equals `wanted`, [tokens, h'].

    Both streams of the student are one tensor, unless attention and FFN read the same stream. `branch` is None where
    the layer has no FFN.
    """

    layer: int
    branch: Branch | None
    read: Tensor
    base: Tensor
    wanted: Tensor


def in_step(
    teacher: tuple[nn.Module, Anatomy],
    student: tuple[nn.Module, Anatomy],
    hosts: Sequence[int],
    channels: Sequence[int],
    batches: Iterable[Tensor],
    place: torch.device,
) -> Iterator[FfnTarget]:
    """Run two streams through a teacher and its student; yield for each layer of the student what its FFN is to match.

    `base` is the student's stream without what the FFN adds, and `wanted` the teacher's where the host of the student's
    next layer reads it, so that an FFN can also compensate for removed layers. Layer s of the student comes from layer
    `hosts[s]`, ascending; its channels are `channels` of the teacher's. What the branch adds, with the weights that it
    has when the next item is requested, is then added to the student's stream.

    Models map ids [batch, sequence] to hidden states. Time: a forward pass of either.
    Memory: on `place` a layer, a batch, and of all batches what layers pass on beside the stream, such as keys that
    later layers read; on the models' own device two streams of all batches, three where attention and FFN read the same
    one, a copy of an FFN, and what is yielded.
    """
    batches = list(batches)
    home = next(student[0].parameters()).device
    small = layers_of(dict(student[0].named_modules(prefix=student[1].family.decoder)), student[1])
    large = layers_of(dict(teacher[0].named_modules(prefix=teacher[1].family.decoder)), teacher[1])
    teachers, students = recorded(teacher[0], large, batches), recorded(student[0], small, batches)
    shared, after = torch.tensor(channels, device=home), 0
    none = next(student[0].parameters()).new_empty(0, len(channels))  # all that a rank without a batch has
    for index, layer in enumerate(small):
        until = hosts[index + 1] if index + 1 < len(hosts) else len(large)
        for number in range(after, until):
            _pass(teachers, large[number], number, place, home)
        after = until
        parts = ffn_parts(layer, student[1], index)
        others = mixers(layer, parts)
        silent = {name: Silent(part, None) for name, part in others.items()}
        before = [step.hidden.clone() for step in students] if parts and student[1].family.parallel else []
        with ExitStack() as quiet:
            if students:
                layer.to(place)
                quiet.enter_context(silenced(parts, students[0].hidden.to(place)))
                quiet.enter_context(observed(others, silent))
            _pass(students, layer, index, place, home)
        call = _moved(students[0].arguments[index], place) if students else ((), {})
        branch = Branch(layer, silent, call) if parts else None
        wanted = _gathered([step.hidden for step in teachers], shared, none)
        base = _gathered([step.hidden for step in students], slice(None), none)
        targets = [FfnTarget(index, branch, _gathered(before, slice(None), none) if before else base, base, wanted)]
        del wanted, base
        yield targets.pop()  # held no more: what the caller is done with is free before the next pass
        if branch is not None:
            _add(students, before, branch, place, home)
        del branch, call, silent, before  # an FFN of experts is large


@torch.no_grad()
def _pass(steps: Sequence[Step], layer: nn.Module, index: int, place: torch.device, home: torch.device) -> None:
    """Run all streams through a layer, which is on `place` for that long."""
    layer.to(place)
    for step in steps:
        step.advance(layer, index, place)
    layer.to(home)


@torch.no_grad()
def _add(
    steps: Sequence[Step], before: Sequence[Tensor], branch: Branch, place: torch.device, home: torch.device
) -> None:
    """Add to all streams what a branch, which is on `place` for that long, makes of them, or of any `before`."""
    weights = branch.to(place).computed()
    for number, step in enumerate(steps):
        stream = step.hidden.to(place)
        read = before[number].to(place) if before else stream
        added = functional_call(branch, weights, (read.flatten(0, 1),))
        step.hidden.copy_(stream + added.view(stream.shape))
    branch.to(home)


def _gathered(streams: Sequence[Tensor], channels: Tensor | slice, none: Tensor) -> Tensor:
    """Return channels of all streams, [tokens, h'], like `none` [0, h']; beside them one batch's at a time."""
    counts = [stream.shape[:-1].numel() for stream in streams]
    rows = none.new_empty(sum(counts), none.shape[1])
    for part, stream in zip(rows.split(counts), streams, strict=True):
        part.copy_(stream.flatten(0, 1)[:, channels])
    return rows


def layers_of(modules: Mapping[str, nn.Module], anatomy: Anatomy) -> list[nn.Module]:
    """Return the layers among modules named as in the checkpoint."""
    prefix = anatomy.family.prefix.rstrip(".")
    return [modules[prefix.format(layer=layer)] for layer in range(len(anatomy.sizes.layers))]


def _moved(value: Any, place: torch.device) -> Any:
    return _mapped(value, lambda tensor: tensor.to(place))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the same structure of dictionaries, tuples and lists with every tensor changed.

    A `UserDict`, in which layers share their keys and values, is returned itself.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_mapped(entry, change) for entry in value)
    return value


def _held_once(value: Any, held: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Return the structure with tensors of `held` in place of equal ones, and all tensors of the result."""
    own = {id(tensor): tensor for tensor in _tensors(value)}
    once = {key: next((other for other in held if _alike(tensor, other)), tensor) for key, tensor in own.items()}
    return _mapped(value, lambda tensor: once[id(tensor)]), list(once.values())


def _tensors(value: Any) -> list[Tensor]:
    """Return every tensor of a structure, as often as it occurs."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(value, note)
    return found


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)

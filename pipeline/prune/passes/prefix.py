"""Forward passes that begin in the middle of a model, to measure a change from the changed layer on."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from pipeline.model.anatomy import Anatomy
from pipeline.model.causal import CausalModel
from pipeline.model.forwards import replaced_forward
from pipeline.prune.importance.measure import layer_of, only_layers


class PrefixCache:
    """The residual streams of batches of ids [batch, sequence] after the first layers of a causal model.

    A pass that continues from there gives exactly the results of a whole one. Memory: on the host one row [h] a token,
    none before the first layer. No stream ends between a layer and a later one that reuses its results.
    """

    def __init__(self, model: CausalModel, anatomy: Anatomy, batches: Sequence[Tensor]):
        self.model, self.batches = model, batches
        self.total = len(anatomy.sizes.layers)
        self.reused_from = anatomy.reused_from
        self.done: list[int] = []
        self.tried: Sequence[int] = ()
        self.streams: list[Tensor | None] = [None] * len(batches)  # none: as the embedding gives it

    def reach(self, layers: Sequence[int]) -> None:
        """Move the streams to after these layers, ascending: from where they are, else from the embedding."""
        if list(layers[: len(self.done)]) != self.done:
            self.done, self.streams = [], [None] * len(self.batches)
        run: list[int] = []
        for layer in layers[len(self.done) :]:
            run.append(layer)
            if any(source <= layer < reader for reader, source in self.reused_from.items()):
                continue
            for number in range(len(self.batches)):
                self.streams[number] = self._behind(run, number)
            self.done += run
            run = []

    def reach_for(self, kept: Sequence[int]) -> None:
        """Move the streams to after the first layers that `kept` and the choice before it have in common."""
        self.reach(_shared(kept, self.tried))
        self.tried = kept

    def rest(self, number: int, kept: Sequence[int]) -> AbstractContextManager[None]:
        """Within the block, a pass of batch `number` runs the layers of `kept` that come after the streams.

        `kept` begins with the layers that the streams have passed, and has at least one more.
        """
        return self._alone(kept[len(self.done) :], number)

    @torch.inference_mode()
    def _behind(self, layers: Sequence[int], number: int) -> Tensor:
        """Return the stream [batch, sequence, h] of a batch after the next layers, on the host."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output).cpu())

        hook = layer_of(self.model, layers[-1]).register_forward_hook(keep)
        try:
            with self._alone(layers, number):
                place = next(self.model.parameters()).device
                self.model.base_model(input_ids=self.batches[number].to(place), use_cache=False)
        finally:
            hook.remove()
        return seen[0]

    @contextmanager
    def _alone(self, layers: Sequence[int], number: int) -> Iterator[None]:
        """Within the block, run these layers only, the first of them on the stored stream, if there is one."""
        first, stream = layer_of(self.model, layers[0]), self.streams[number]
        whole = first.forward

        def fed(hidden_states: Tensor, *rest, **named) -> Tensor | tuple:
            here = hidden_states if stream is None else stream.to(hidden_states.device)
            return whole(here, *rest, **named)

        with only_layers(self.model, self.total, layers), replaced_forward({} if stream is None else {first: fed}):
            yield


def _shared(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the first layers that two choices have in common, without the last of `one`: a pass runs at least that."""
    count = 0
    while count < min(len(one) - 1, len(other)) and one[count] == other[count]:
        count += 1
    return list(one[:count])

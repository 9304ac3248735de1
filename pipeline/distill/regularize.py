"""Regularization before layer removal: train until the layers to remove contribute little (TRSP 2505.18232, stage 2).

The loss is LM + weight * sum over the picked layers of |X_out - X_in|, the l1 or l2 norm over channels, a mean over
tokens. The other layers take over the function of the picked ones, which are then deleted.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distill.gates import stream_of
from pipeline.distill.next_token import LanguageModel

ORDERS = {"l1": 1, "l2": 2}


class Settling(nn.Module):
    """A causal language model and the loss that shrinks the contribution of its picked layers.

    In training mode `forward(tokens)` returns that loss and its parts; in evaluation mode the parts alone count:
    `cross_entropy`, the next-token loss in nats, and `change`, the sum of the norms.
    """

    def __init__(
        self, model: Any, picked: Sequence[int], weight: float, norm: str, chunk: int, gradient_checkpointing: bool
    ):
        """Wrap a Hugging Face causal language model; `chunk`: tokens whose logits exist at once."""
        super().__init__()
        self.language = LanguageModel(model, chunk, gradient_checkpointing)
        self._picked, self._weight, self._order = tuple(picked), weight, ORDERS[norm]
        self._streams: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in self._picked:
            self.language.model.layers[layer].register_forward_hook(partial(self._keep, layer), with_kwargs=True)

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by their names in the checkpoint, tied ones once."""
        return self.language.parameters_by_name()

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens: [batch, sequence]."""
        entropy, parts = self.language(tokens)
        change = sum((self._change(layer) for layer in self._picked), entropy.new_zeros(()))
        self._streams.clear()
        return entropy + self._weight * change, parts | {"change": change.detach()}

    def _change(self, layer: int) -> Tensor:
        before, after = self._streams[layer]
        exact = torch.promote_types(after.dtype, torch.float32)
        return torch.linalg.vector_norm(after.to(exact) - before.to(exact), self._order, dim=-1).mean()

    def _keep(self, layer: int, module: nn.Module, arguments: tuple, named: dict, output: Any) -> None:
        self._streams[layer] = stream_of(arguments, named, output)

"""The next-token loss of a causal language model, logits existing for one chunk of tokens at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from pipeline.distill.loss import IGNORED
from pipeline.model.logits import LogitForm, logit_form, shaped
from pipeline.model.marks import ids_of, positions

HELD = 4  # tensors of a chunk's logits in float32 or better that exist at once (tests/numerics/test_loss_buffers.py)


class LanguageModel(nn.Module):
    """A causal language model and its next-token loss.

    `forward(tokens)` returns that loss, a scalar in nats, and its parts: `cross_entropy`, the same.
    """

    def __init__(self, model: Any, chunk: int, gradient_checkpointing: bool):
        """Wrap a Hugging Face causal language model; `chunk`: tokens whose logits exist at once."""
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.model = model.base_model
        self.head = LanguageHead(model, chunk)
        if gradient_checkpointing:
            recompute_activations(model)

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by their names in the checkpoint, tied ones once."""
        for parameter in self.parameters():
            yield self._names[id(parameter)], parameter

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens: [batch, sequence]; with marks, the loss is the mean over the marked tokens."""
        ids = ids_of(tokens)
        states = self.model(input_ids=ids, use_cache=False).last_hidden_state
        entropy = self.head(states, next_tokens(ids).masked_fill(~positions(tokens), IGNORED))
        return entropy, {"cross_entropy": entropy.detach()}


class LanguageHead(nn.Module):
    """A model's output matrix and the cross entropy of its logits.

    The matrix is a parameter of this module and is read in its forward alone, which is where ZeRO-3 gathers it.
    """

    def __init__(self, model: Any, chunk: int):
        """`model`: a Hugging Face causal language model; `chunk`: tokens whose logits exist at once."""
        super().__init__()
        output = model.get_output_embeddings()
        self.weight, self.bias = output.weight, output.bias
        self._form, self._chunk = logit_form(model.config), chunk

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over labels [batch, sequence], in nats, of final hidden states [batch, sequence, h]."""
        flat = hidden.flatten(0, 1)
        return _CrossEntropy.apply(flat, self.weight, self.bias, labels.flatten(), self._form, self._chunk)


def recompute_activations(model: Any) -> None:
    """Keep only the inputs of a model's layers for the backward pass, and recompute the rest there."""
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # the name changed between releases
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})


def next_tokens(tokens: Tensor) -> Tensor:
    """Return the label of every position [batch, sequence]; the last position of a sequence has IGNORED."""
    return torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)), dim=1)


class _CrossEntropy(torch.autograd.Function):
    """The cross entropy of one chunk of tokens after another.

    The forward pass computes the gradients that are needed; those of the matrix are added in float32 or better.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, form: LogitForm, chunk: int):
        leaves = [hidden, weight, *([] if bias is None else [bias])]
        wanted = [place for place in range(len(leaves)) if ctx.needs_input_grad[place]]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        count = (labels != IGNORED).sum().clamp_min(1)
        loss = hidden.new_zeros((), dtype=exact)
        sums = {place: torch.zeros_like(leaves[place], dtype=exact) for place in wanted}
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            own = [hidden[part].detach(), *(leaf.detach() for leaf in leaves[1:])]
            own = [leaf.requires_grad_(place in wanted) for place, leaf in enumerate(own)]
            with torch.enable_grad():
                value = cross_entropy(shaped(linear(*own).to(exact), form), labels[part], reduction="sum") / count
            loss += value.detach()
            for place, gradient in zip(wanted, torch.autograd.grad(value, [own[i] for i in wanted]) if wanted else ()):
                (sums[place][part] if place == 0 else sums[place]).add_(gradient)
        ctx.gradients = [sums[i].to(leaves[i].dtype) if i in sums else None for i in range(3)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError("the next-token loss keeps its gradients for one backward pass; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if each is None else each.mul_(grad_loss) for each in gradients), None, None, None

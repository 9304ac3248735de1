"""Perplexity, top-1 accuracy and bits per byte of a model over packed text: the one place they are computed.

Sequences are packed, equally long and do not overlap (stride = length). Every token but the first of a sequence is
predicted from the tokens before it in the same sequence.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.model.causal import CausalModel
from pipeline.model.logits import logits_of

LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text.

    `loss` is the mean negative log-likelihood in nats of a token, of the model's own or of another tokenizer's on the
    same text (`quality`), and `perplexity` its exponential.
    """

    loss: float
    perplexity: float  # infinite where it overflows, or the loss is NaN
    accuracy: float  # fraction of the model's own tokens that are its first choice
    bits_per_byte: float


def tally(model: CausalModel, batches: Iterable[Tensor], chunk: int) -> Tensor:
    """Return [3] float64 on the CPU: summed negative log-likelihood in nats, correct first choices, predicted tokens.

    Arguments as of `tallies`. Tallies of disjoint batches add up.
    """
    return torch.cat([torch.zeros(1, 3, dtype=torch.float64), *tallies(model, batches, chunk)]).sum(0)


@torch.inference_mode()
def tallies(model: CausalModel, batches: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """Yield for each batch the tally of each of its sequences, [b, 3] float64 on the CPU.

    `batches` are token ids [b, t]. The log-softmax runs in float32 (or better) over `chunk` tokens at once, so the full
    logits [b, t, v] never exist.
    """
    device = next(model.parameters()).device
    for ids in batches:
        ids = ids.to(device)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)  # [b(t-1), h]
        parts = zip(states.split(chunk), ids[:, 1:].flatten().split(chunk))
        found = torch.cat([_found(logits_of(model, here), wanted) for here, wanted in parts])  # [b(t-1), 2]
        sums = found.cpu().double().view(len(ids), ids.shape[1] - 1, 2).sum(1)
        yield torch.cat([sums, torch.full((len(ids), 1), ids.shape[1] - 1.0, dtype=torch.float64)], 1)


def _found(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return [tokens, 2]: the negative log-likelihood of each, and whether it is the first choice."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(exact, wanted, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) == wanted).to(losses.dtype)], 1)


@dataclass(frozen=True)
class Over:
    """A model's perplexity over that of another on the same sequences, and its standard error over them.

    Infinite where they overflow or are NaN.
    """

    times: float
    error: float


def over(losses: Sequence[float | None], others: Sequence[float | None], paired: bool = True) -> Over | None:
    """Compare mean losses in nats by sequence, equally long sequences in the same order; None for a single sequence.

    A loss of None is NaN (`finite`). Sequences that are hard are so for both models, so the standard error is that of
    the mean difference, propagated through exp: e^d s / sqrt(n), s the deviation of the n differences, d their mean.
    Sequences of different tokenizers are not `paired`: s² / n is then the sum of the two models' own, which is larger.
    """
    if min(len(losses), len(others)) < 2:
        return None
    both = ([math.nan if loss is None else loss for loss in each] for each in (losses, others))
    ours, theirs = (torch.tensor(each, dtype=torch.float64) for each in both)
    times = _exp(float(ours.mean() - theirs.mean()))
    parts = [ours - theirs] if paired else [ours, theirs]
    error = times * math.sqrt(sum(float(part.var()) / len(part) for part in parts))
    return Over(times, error if math.isfinite(times) else math.inf)


def quality(total: Tensor, text_bytes: int, unit: float = 1.0) -> Quality:
    """Return the figures of a tally [3] and the UTF-8 length of the predicted text; ValueError without a token.

    `unit`: the length of the token that loss and perplexity are of, in the model's own tokens.
    """
    nats, hits, tokens = total.tolist()
    if not tokens or not text_bytes:
        raise ValueError("data.evaluation: the text has no predicted token; use at least one sequence")
    loss = nats / tokens * unit
    return Quality(loss, _exp(loss), hits / tokens, nats / math.log(2) / text_bytes)


def finite(figures: Any) -> Any:
    """Return figures as JSON can hold them: None in place of every number that is infinite or NaN."""
    if isinstance(figures, Mapping):
        return {name: finite(each) for name, each in figures.items()}
    if isinstance(figures, list | tuple):
        return [finite(each) for each in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def _exp(nats: float) -> float:
    return math.exp(nats) if nats <= LARGEST else math.inf

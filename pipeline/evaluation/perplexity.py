"""Perplexity, top-1 accuracy and bits per byte of a model over packed text: the one place they are computed.

Sequences are packed, equally long and do not overlap (stride = length). Every token but the first of a sequence is
predicted from the tokens before it in the same sequence.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text. `loss` is the mean negative log-likelihood of a token in nats."""

    loss: float
    perplexity: float
    accuracy: float  # share of tokens that are the model's first choice
    bits_per_byte: float


@torch.inference_mode()
def tally(model: torch.nn.Module, batches: Iterable[Tensor], chunk: int) -> Tensor:
    """Give [3] float64 on the CPU: summed negative log-likelihood in nats, correct first choices, predicted tokens.

    `batches` are token ids [b, t]. The log-softmax runs in float32 (or better) over `chunk` tokens at once, so the full
    logits [b, t, v] never exist. Tallies of disjoint batches add up.
    """
    total = torch.zeros(3, dtype=torch.float64)
    device = next(model.parameters()).device
    for ids in batches:
        ids = ids.to(device)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)  # [b(t-1), h]
        parts = zip(states.split(chunk), ids[:, 1:].flatten().split(chunk))
        sums = torch.stack([_sums(logits_of(model, here), wanted) for here, wanted in parts])  # [part, 2]
        total[:2] += sums.cpu().double().sum(0)
        total[2] += len(states)
    return total


def _sums(logits: Tensor, wanted: Tensor) -> Tensor:
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(exact, wanted, reduction="sum")
    return torch.stack([loss, (logits.argmax(-1) == wanted).sum().to(loss.dtype)])


def logits_of(model: torch.nn.Module, states: Tensor) -> Tensor:
    """Give the logits [..., v] of final hidden states [..., h], soft-capped where the model's configuration says so."""
    logits = model.get_output_embeddings()(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def quality(total: Tensor, text_bytes: int) -> Quality:
    """Turn a tally [3] and the UTF-8 length of the predicted text into numbers; ValueError if nothing was predicted."""
    nats, hits, tokens = total.tolist()
    if not tokens or not text_bytes:
        raise ValueError("evaluation text has no predicted token; data.evaluation must hold one sequence at least")
    loss = nats / tokens
    return Quality(loss, math.exp(loss), hits / tokens, nats / math.log(2) / text_bytes)

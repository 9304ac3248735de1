"""The assistant's turns of chats: a student compared with its reference on the tokens that marks count.

Both models predict the same tokens; what is compared is what they predict, and what they answer greedily.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.perplexity import LARGEST
from pipeline.evaluation.samples import continue_greedily
from pipeline.model.causal import CausalModel
from pipeline.model.logits import logits_of
from pipeline.model.marks import ids_of, positions

SUMS = ("kl", "agreement", "teacher_nats", "student_nats", "teacher_hits", "student_hits", "tokens")


@dataclass(frozen=True)
class Turn:
    """A prompt [1, t] that an assistant answers, the ids [n] of its answer, and the ids that end an answer."""

    prompt: Tensor
    answer: Tensor
    stop: frozenset[int]


@torch.inference_mode()
def compared(reference: CausalModel, student: CausalModel, batches: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """Yield for each batch of marked tokens [b, t] the SUMS of each of its sequences, [b, 7] float64 on the CPU.

    KL of reference to student, in nats; equal first choices; negative log-likelihoods; correct first choices; counted
    tokens. Logits exist for `chunk` tokens at once.
    """
    for tokens in batches:
        ids, counted = ids_of(tokens), positions(tokens)
        labels = ids.roll(-1, 1)[counted]
        states = [_states(model, ids, counted) for model in (reference, student)]
        parts = zip(*(each.split(chunk) for each in (*states, labels)))
        found = [_found(reference, student, *part) for part in parts]
        sums = torch.zeros(len(tokens), len(SUMS), dtype=torch.float64)
        if found:
            sums.index_add_(0, counted.nonzero()[:, 0], torch.cat(found))
        yield sums


def _states(model: CausalModel, ids: Tensor, counted: Tensor) -> Tensor:
    """Return the hidden states [counted, h] of a model, on its device."""
    device = next(model.parameters()).device
    return model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state[counted.to(device)]


def _found(reference: CausalModel, student: CausalModel, theirs: Tensor, ours: Tensor, labels: Tensor) -> Tensor:
    """Return SUMS of each token, [t, 7] float64 on the CPU."""
    logits = [logits_of(model, states) for model, states in ((reference, theirs), (student, ours))]
    width = min(each.shape[-1] for each in logits)  # rows of an output matrix beyond it are of no tokens
    y, z = (_log_softmax(each[:, :width]) for each in logits)
    wanted = labels.to(y.device)[:, None]
    kl = (y.exp() * (y - z)).sum(-1)
    first, second = y.argmax(-1), z.argmax(-1)
    nats = [-each.gather(1, wanted)[:, 0] for each in (y, z)]
    hits = [choice == wanted[:, 0] for choice in (first, second)]
    columns = (kl, first == second, *nats, *hits, torch.ones_like(kl))
    return torch.stack([column.to("cpu", torch.float64) for column in columns], 1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def figures(sums: Tensor) -> dict[str, Any] | None:
    """Return the figures of SUMS [sequences, 7]; None where no token is counted.

    The standard error of the KL is over sequences, of a ratio of sums: sqrt(Σ (K_i - k n_i)²) / Σ n_i.
    """
    total = dict(zip(SUMS, sums.sum(0).tolist(), strict=True))
    tokens = total["tokens"]
    if not tokens:
        return None
    kl = total["kl"] / tokens
    error = float((sums[:, 0] - kl * sums[:, -1]).square().sum().sqrt()) / tokens
    found = {"tokens": int(tokens), "kl": kl, "kl_error": error, "agreement": total["agreement"] / tokens}
    for who in ("teacher", "student"):
        loss = total[f"{who}_nats"] / tokens
        perplexity = math.exp(loss) if loss <= LARGEST else math.inf
        found[who] = {"loss": loss, "perplexity": perplexity, "accuracy": total[f"{who}_hits"] / tokens}
    return found


def turns_of(rows: Iterable[Tensor], special: frozenset[int], end: int | None, count: int) -> list[Turn]:
    """Return the first assistant turn of each marked row [t], of the first `count` rows that have one."""
    firsts = (next(turns_in(row, special, end), None) for row in rows)
    return list(islice((turn for turn in firsts if turn is not None), count))


def turns_in(row: Tensor, special: frozenset[int], end: int | None) -> Iterator[Turn]:
    """Yield the assistant turns of a marked row [t].

    A turn begins behind a token that is not counted. Its answer ends at the token that ends it in the row, where that
    is one of the `special` ids, and at `end`.
    """
    for start in (((row[1:] >= 0) & (row[:-1] < 0)).nonzero()[:, 0] + 1).tolist():
        behind = (row[start:] < 0).nonzero()[:, 0]
        answer = row[start : start + int(behind[0])] if len(behind) else row[start:]
        last = int(answer[-1]) if len(behind) else None
        stop = {each for each in (end, last if last in special else None) if each is not None}
        yield Turn(ids_of(row[:start])[None], answer, frozenset(stop))


def greedy(model: CausalModel, turns: Iterable[Turn], tokens: int) -> list[list[int]]:
    """Return the greedy answer of a model to each turn, of at most `tokens` tokens."""
    return [continue_greedily(model, turn.prompt, tokens, turn.stop) for turn in turns]


def equal(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> Tensor:
    """Return [3] float64: equal answers, the sum of the shares of answers before their first difference, and answers.

    Each answer is compared with that to the same turn.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for first, second in zip(theirs, ours, strict=True):
        sums += torch.tensor([float(first == second), shared(first, second), 1.0], dtype=torch.float64)
    return sums


def shared(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the share of the longer answer before the first difference; 1 for two that are empty."""
    longest = max(len(first), len(second))
    pairs = zip(first, second)
    equal = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return equal / longest if longest else 1.0


def greedy_figures(sums: Tensor, tokens: int) -> dict[str, Any] | None:
    """Return the figures of `equal` answers; None without an answer."""
    identical, before, answers = sums.tolist()
    if not answers:
        return None
    return {"answers": int(answers), "tokens": tokens, "identical": identical / answers, "shared": before / answers}

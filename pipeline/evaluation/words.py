"""Next-word accuracy on held-out text: the last word of a sentence, from what stands before it (after LAMBADA)."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.causal import CausalModel
from pipeline.model.logits import logits_of

LAST_WORD = re.compile(r"(?<=[^\W\d_] )[^\W\d_]{3,}(?=[.!?]\s)")  # a word after a word, before the end of a sentence


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of the word that follows it."""

    context: tuple[int, ...]
    word: tuple[int, ...]


def questions(texts: Iterable[str], encode: Callable[[str], Sequence[int]], limit: int, context: int) -> list[Question]:
    """Return at most `limit` questions, spread evenly over the sentences of `texts`.

    A context is at most the `context` characters before the word, cut at a space. A word whose ids are not a plain
    continuation of its context's ids is left out, as is a sentence with less than half a context before it.
    """
    found = [(text, hit) for text in texts for hit in LAST_WORD.finditer(text) if hit.start() >= context // 2]
    count, kept = min(limit, len(found)), []
    for text, hit in (found[place * len(found) // count] for place in range(count)):
        before = text[max(0, hit.start() - context) : hit.start() - 1]
        before = before[before.find(" ") + 1 :]
        head = tuple(encode(before))
        whole = tuple(encode(f"{before} {hit.group()}"))
        if whole[: len(head)] == head and len(whole) > len(head) > 0:
            kept.append(Question(head, whole[len(head) :]))
    return kept


@torch.inference_mode()
def right(model: CausalModel, given: Sequence[Question], batch: int) -> Tensor:
    """Return [2] float64 on the CPU: the questions whose whole word is the greedy continuation, and all of them.

    Contexts and words run through the model together, padded on the right: with causal attention padding changes
    nothing before it, and a word is the greedy continuation exactly when each of its ids is the first choice.
    """
    device = next(model.parameters()).device
    hits = 0
    for start in range(0, len(given), batch):
        some = given[start : start + batch]
        width = max(len(q.context) + len(q.word) for q in some)
        ids = torch.zeros(len(some), width, dtype=torch.int64)
        for row, q in zip(ids, some):
            row[: len(q.context) + len(q.word)] = torch.tensor(q.context + q.word)
        states = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        for row, q in zip(states, some):
            first, last = len(q.context) - 1, len(q.context) + len(q.word) - 1
            choices = logits_of(model, row[first:last]).argmax(-1).tolist()
            hits += choices == list(q.word)
    return torch.tensor([hits, len(given)], dtype=torch.float64)

"""Text that a model generates: calibration and recovery text from its own distribution.

Documents begin with a word drawn at random, as in LLM-QAT (2305.17888), or as a user's turn of the chat template, which
an instruction-tuned model fills with a question and then answers (Magpie, 2406.08464). Tokens are sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.samples import continued
from pipeline.model.causal import CausalModel
from pipeline.model.decoding import cache_of, drawn


def word_starts(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that are a word of three letters or more, only capitalised ones if there are any.

    ValueError where no token is a word.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = {place: token.lstrip("Ġ▁") for place, token in enumerate(tokens) if token}
    words = {place: word for place, word in words.items() if len(word) > 2 and word.isalpha()}
    if not words:
        raise ValueError("the tokenizer has no token that is a word of three letters; set self_generate.chat=1.0")
    return [place for place, word in words.items() if word[0].isupper()] or list(words)


@torch.inference_mode()
def sample(model: CausalModel, starts: Tensor, tokens: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Return ids [b, tokens] sampled one after another after `starts` [b, s], with a key/value cache."""
    step = model(input_ids=starts, use_cache=True, logits_to_keep=1)
    chosen: list[Tensor] = []
    for _ in range(tokens):
        logits = step.logits[:, -1].float()
        noise = torch.empty_like(logits).exponential_(generator=generator)
        chosen.append(drawn(logits, temperature, noise)[:, None])
        if len(chosen) < tokens:
            step = continued(model, chosen[-1], step)
    return torch.cat(chosen, 1)


@dataclass(frozen=True)
class TurnIds:
    """Ids that separate the turns of a chat in a model's template."""

    between: tuple[int, ...]  # from the end of the user's words to where the reply begins
    after: tuple[int, ...]  # what ends the reply
    special: frozenset[int]  # no words contain them

    @property
    def marked(self) -> bool:
        """Whether a special token ends each of the turns: only then can a turn's end be seen at the token."""
        return {self.between[0], self.after[0]} <= self.special


@torch.inference_mode()
def sample_chats(
    model: CausalModel, starts: Tensor, turns: TurnIds, tokens: int, temperature: float, generator: torch.Generator
) -> list[list[int]]:
    """Return the ids sampled after each row of `starts` [b, s]: a user's words, `turns.between`, a reply, its end.

    What ends the user's words is sampled; what the template writes behind it is not (as in Magpie, 2406.08464). A row
    leaves the batch at any other special token, or after `tokens` tokens.
    """
    rows: list[list[int]] = [[] for _ in starts]
    left: dict[int, list[int]] = {}  # by row that has a reply: what is still to be copied from the template
    live = list(range(len(rows)))
    step = model(input_ids=starts, use_cache=True, logits_to_keep=1)
    for number in range(tokens):
        logits = step.logits[:, -1].float()
        noise = torch.empty_like(logits).exponential_(generator=generator)
        places = []
        for place, (row, id_) in enumerate(zip(live, drawn(logits, temperature, noise).tolist(), strict=True)):
            copied = bool(left.get(row))
            rows[row].append(left[row].pop(0) if copied else id_)
            if row not in left and id_ == turns.between[0]:
                left[row] = list(turns.between[1:])
            elif not copied and id_ in turns.special:
                rows[row] += turns.after[1:] if row in left and id_ == turns.after[0] else ()
                continue
            places.append(place)
        if not places or number == tokens - 1:
            break
        if len(places) < len(live):
            live = [live[place] for place in places]
            cache_of(step).reorder_cache(torch.tensor(places, device=logits.device))
        step = continued(model, torch.tensor([rows[row][-1:] for row in live], device=logits.device), step)
    return rows


def written(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of ids: the runs between special tokens, separated by empty lines."""
    special = special_ids(tokenizer)
    runs = [list(run) for between, run in groupby(ids, lambda id_: id_ not in special) if between]
    return "\n\n".join(text for text in (tokenizer.decode(run).strip() for run in runs) if text)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokenizer's special tokens; a turn's end need not be one that it has a name for."""
    marked = (id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *marked])

"""Text that a model generates: calibration and recovery text from its own distribution.

Documents begin with a word drawn at random, as in LLM-QAT (2305.17888), or as a user's turn of the chat template, which
an instruction-tuned model fills with a question and then answers (Magpie, 2406.08464). Tokens are sampled.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.samples import continued
from pipeline.model.causal import CausalModel
from pipeline.model.decoding import drawn


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


def written(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of ids: the runs between special tokens, separated by empty lines."""
    marked = (id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {*tokenizer.all_special_ids, *marked}  # a turn's end need not be one that the tokenizer has a name for
    runs = [list(run) for between, run in groupby(ids, lambda id_: id_ not in special) if between]
    return "\n\n".join(text for text in (tokenizer.decode(run).strip() for run in runs) if text)

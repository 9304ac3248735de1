"""Greedy continuations, token by token with a key/value cache."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pipeline.model.causal import CausalModel
from pipeline.model.decoding import cache_name, cache_of


@dataclass(frozen=True)
class Prompt:
    """What models continue for the report.

    `text` is the evaluation text it is from; `content` is what a model reads, which has its special tokens where
    `templated`; `prompt` and `reference`, what follows it in the text, are shown; `stops` are the tokens that end a
    continuation.
    """

    text: str
    content: str
    templated: bool
    prompt: str
    reference: str
    stops: frozenset[str]


@torch.inference_mode()
def continuation(model: CausalModel, prompt: Tensor) -> Iterator[Tensor]:
    """Yield the model's first choice [1, 1] after `prompt` [1, t], then after the prompt and that choice, and so on.

    The first step is the prefill of the whole prompt, every further one the decoding of one token. Nothing is copied
    off the device, so the steps can be timed.
    """
    step = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    while True:
        token = step.logits[:, -1:].argmax(-1)
        yield token
        step = continued(model, token, step)


def continued(model: CausalModel, ids: Tensor, step: Any) -> Any:
    """Return the output of a model for ids [b, t] after those of an earlier output, with that output's cache."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name(model): cache_of(step)})


def continue_greedily(model: CausalModel, prompt: Tensor, tokens: int, stop: frozenset[int]) -> list[int]:
    """Return up to `tokens` greedy ids after `prompt` [1, t], ending before the first id in `stop`.

    A prompt that leaves too few of the model's positions loses its beginning.
    """
    ids = []
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompt = prompt if longest is None else prompt[:, -max(1, longest - tokens) :]
    for token in islice(continuation(model, prompt.to(next(model.parameters()).device)), tokens):
        ids.append(int(token))
        if ids[-1] in stop:
            return ids[:-1]
    return ids


@torch.inference_mode()
def cache_bytes_per_token(model: CausalModel, prompt: Tensor, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values that the model caches for one token, measured after `prompt` [1, t].

    They are counted as of type `dtype`, whatever this device computes in.

    Layers without attention have a state of fixed size, which is not counted.
    """
    step = model(input_ids=prompt.to(next(model.parameters()).device), use_cache=True, logits_to_keep=1)
    layers = [layer for layer in cache_of(step).layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers) // prompt.shape[1] * dtype.itemsize


def opening(text: str, characters: int) -> tuple[str, str]:
    """Return a prompt of at most `characters`, from the start of a sentence of `text` to the end of a word, and what
    follows it, as long.
    """
    end_of_sentence = re.search(r"[.!?]\s+(?=[^\W\d_])", text)
    text = text[end_of_sentence.end() :] if end_of_sentence and len(text) - end_of_sentence.end() > characters else text
    prompt = text[:characters]
    prompt = prompt[: prompt.rfind(" ")] if " " in prompt else prompt
    follows = text[len(prompt) : len(prompt) + characters]
    return prompt, follows[: follows.rfind(" ")] if " " in follows.strip() else follows

"""What transformers computes, and how far an engine's answers are from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pipeline.runtime.model_loader import load_model

PROMPTS, LENGTH, NEW = 3, 24, 24  # prompts, their tokens, and the greedy tokens after each

SENTENCES = (
    "The river rises in the mountains and",
    "To bake bread one needs flour, water,",
    "In the year 1900 most people in Europe",
)


@dataclass(frozen=True)
class Agreement:
    """How an engine agrees with transformers on its own greedy tokens."""

    tokens: int  # tokens of the engine
    equal: int  # of these, the most likely ones of transformers after the same prefix
    difference: float  # largest absolute difference of their log-probabilities, in nats


def prompts(vocabulary: int) -> list[list[int]]:
    """Return random prompts without the first ids, which are special tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (PROMPTS, LENGTH), generator=generator).tolist()


def sentences(folder: Path) -> list[list[int]]:
    """Return prompts in English by the tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [tokenizer(text)["input_ids"] for text in SENTENCES]


def agreement(folder: Path, given: list[list[int]], answers: list[dict[str, Any]]) -> Agreement:
    """Compare an engine's answers to prompts with transformers' logits of the student in a folder, in float32."""
    model = load_model(folder, torch.float32, "eager")
    equal, difference, count = 0, 0.0, 0
    for prompt, answer in zip(given, answers, strict=True):
        ids = torch.tensor(answer["ids"])
        assert len(ids) == NEW
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer["ids"]]])).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.log_softmax(logits, dim=-1)
        found = torch.tensor(answer["logprobs"], dtype=torch.float64)
        gaps = (expected.gather(1, ids[:, None])[:, 0] - found).abs()
        equal += int((expected.argmax(dim=-1) == ids).sum())
        difference, count = max(difference, float(gaps.max())), count + len(ids)
    return Agreement(count, equal, difference)

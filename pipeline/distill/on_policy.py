"""On-policy distillation: the student writes answers, and its loss is the divergence from its teacher on them.

Both models predict every token of an answer that the current student has drawn (Agarwal et al., 2306.13649; Gu et al.,
2306.08543). Gradients flow through the student's distributions at the drawn positions, not through the drawing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.distill.distiller import Distiller, Objective
from pipeline.model.decoding import cache_name, cache_of, drawn
from pipeline.model.logits import logit_form, shaped
from pipeline.model.marks import ids_of

UNUSED = ~0  # a token behind the end of an answer, which no loss counts


@dataclass
class Written:
    """What a model has read and written so far: the cache of its last pass, None before the first."""

    cache: Any = None


class OnPolicyDistiller(Distiller):
    """A distiller that also predicts the next token of its student.

    In training mode the loss counts the positions that marks count: answers, and no prompts. In evaluation mode
    `marked` says whether the tokens have marks; with `written` the result is the student's logits [b, v] behind tokens
    [b, t] and what was written before.
    """

    def __init__(self, teacher: Any, student: Any, objective: Objective, gradient_checkpointing: bool, marked: bool):
        super().__init__(teacher, student, objective, None, gradient_checkpointing, marked)
        self._held_out_marked = marked
        self.output = Output(student, self.head.rows)
        self.train()

    def train(self, mode: bool = True) -> "OnPolicyDistiller":
        self._marked = mode or self._held_out_marked
        super().train(mode)
        return self

    def forward(self, tokens: Tensor, written: Written | None = None) -> Any:
        if written is None:
            return super().forward(tokens)
        known = {} if written.cache is None else {cache_name(self.student): written.cache}
        step = self.student(input_ids=tokens, use_cache=True, **known)
        written.cache = cache_of(step)
        return self.output(step.last_hidden_state[:, -1])


class Output(nn.Module):
    """The student's output matrix, a parameter of this module: ZeRO-3 gathers it for this module's forward."""

    def __init__(self, student: Any, rows: int):
        """`rows`: of the matrix, those that the teacher has too."""
        super().__init__()
        output = student.get_output_embeddings()
        self.weight, self.bias = output.weight, output.bias
        self._form, self._rows = logit_form(student.config), rows

    def forward(self, states: Tensor) -> Tensor:
        """Return logits [b, rows] of final hidden states [b, h]."""
        return shaped(linear(states, self.weight, self.bias), self._form)[:, : self._rows]


@dataclass(frozen=True)
class Drawing:
    """How an answer is written: tokens at most, temperature (0: the likeliest token), and the ids that end it."""

    tokens: int
    temperature: float
    stop: frozenset[int]


def answered(
    predict: Callable[[Tensor, Written], Tensor],
    prompts: Sequence[Tensor],
    generators: Sequence[torch.Generator],
    how: Drawing,
    goes_on: Callable[[bool], bool],
) -> Tensor:
    """Return prompts with answers as marked tokens [b, t]: a loss counts the answers, with the id that ends them.

    `predict`: the student's logits [b, v] behind ids [b, t]; `prompts`: ids [p] of each row, whose lengths may differ;
    `generators`: one for each row, on the device of the logits, so that an answer depends on no other row.
    `goes_on`: whether any rank still writes, from whether this one does. All ranks run equally many passes, as ZeRO-3
    needs.

    Rows are not padded. All are read up to the end of the shortest prompt, then a token at a time: that of a longer
    prompt, or one that is drawn.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.full((len(prompts), int(lengths.max()) + how.tokens), UNUSED)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = ~prompt
    stop = torch.tensor(sorted(how.stop), dtype=torch.int64)
    count, writes = torch.zeros_like(lengths), torch.ones_like(lengths, dtype=torch.bool)
    written, read = Written(), 0
    while goes_on(bool(writes.any())):
        if not writes.any():  # another rank writes
            predict(ids_of(tokens[:, :1]), Written())
            continue
        end = int(lengths.min()) if read == 0 else read + 1
        logits = predict(ids_of(tokens[:, read:end]), written)
        read = end
        own = writes & (lengths <= read)
        tokens[own, read] = _chosen(logits, own, generators, how.temperature)
        count += own
        writes &= ~(own & (torch.isin(tokens[:, read], stop) | (count == how.tokens)))
    return tokens[:, : read + 1]


def _chosen(logits: Tensor, own: Tensor, generators: Sequence[torch.Generator], temperature: float) -> Tensor:
    """Return the next ids of the rows `own` [b] of logits [b, v], on the CPU."""
    rows = own.nonzero()[:, 0].tolist()
    logits = logits[rows]
    if not temperature:
        return logits.argmax(-1).cpu()
    noise = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, each in zip(rows, noise, strict=True):
        each.exponential_(generator=generators[row])
    return drawn(logits, temperature, noise).cpu()

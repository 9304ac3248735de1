"""Teacher and student in one module, whose forward returns the loss.

The head module owns both output matrices and computes the loss in its own forward: ZeRO-3 gathers the parameters of the
module that runs, and so gathers exactly what is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distill.loss import linear_distillation
from pipeline.distill.next_token import next_tokens, recompute_activations
from pipeline.model.logits import logit_form
from pipeline.model.marks import ids_of, positions

EMBEDDING = -1  # the place of the embedding output among the layers' outputs


@dataclass(frozen=True)
class Objective:
    """What recovery minimises: a divergence of the logits, and weighted terms beside it (conf distill.loss)."""

    kind: str
    beta: float
    temperature: float
    cross_entropy: float
    hidden: float
    embedding: float
    chunk: int
    kernel: str


@dataclass(frozen=True)
class Match:
    """Which hidden states are compared: `layers` as (student, teacher) pairs, the teacher's at `channels` [h'].

    `channels` None: the widths are equal.
    """

    layers: tuple[tuple[int, int], ...]
    channels: tuple[int, ...] | None


class Distiller(nn.Module):
    """The student, its frozen teacher and the loss between them.

    In training mode `forward(tokens)` returns the objective, a scalar, and its parts; in evaluation mode the forward KL
    at temperature 1, whatever the objective is.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        objective: Objective,
        match: Match | None,
        gradient_checkpointing: bool,
        marked: bool = False,
    ):
        """Wrap two Hugging Face causal language models on the CPU, which must have the same tokens.

        Where one has more rows in its output matrix, for no tokens, the first rows that both have are compared.
        `marked`: tokens have marks (`model/marks.py`), and the loss is of the positions that they count. `match` is
        needed where the objective has hidden-state terms; ValueError where it is missing or does not fit.
        """
        super().__init__()
        _check(teacher, student, objective, match)
        self.objective, self._marked = objective, marked
        self._names = {id(parameter): name for name, parameter in student.named_parameters()}
        self.teacher = teacher.base_model.requires_grad_(False).eval()
        self.student = student.base_model
        self.head = Head(teacher, student, objective)
        self.channels: Tensor | None
        self._match = match if objective.hidden or objective.embedding else None
        if match is not None and self._match is not None:
            channels = None if match.channels is None else torch.tensor(match.channels)
            self.register_buffer("channels", channels, persistent=False)
            places = [EMBEDDING] * bool(objective.embedding)
            pairs = match.layers if objective.hidden else ()
            self._student_states = _watch(self.student, places + [ours for ours, _ in pairs])
            self._teacher_states = _watch(self.teacher, places + [theirs for _, theirs in pairs])
        if gradient_checkpointing:
            recompute_activations(student)

    def train(self, mode: bool = True) -> "Distiller":
        super().train(mode)
        self.teacher.eval()
        return self

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the student's parameters by their names in its checkpoint, tied ones once."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                yield self._names[id(parameter)], parameter

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens: [batch, sequence]."""
        ids, counted = (ids_of(tokens), positions(tokens)) if self._marked else (tokens, None)
        with torch.no_grad():
            target = self.teacher(input_ids=ids, use_cache=False).last_hidden_state
        states = self.student(input_ids=ids, use_cache=False).last_hidden_state
        loss, parts = self.head(states, target, next_tokens(ids), counted)
        if not self.training:
            return loss, {"kl": loss.detach()}
        for name, weight, places in self._terms():
            term = torch.stack([self._difference(ours, theirs, counted) for ours, theirs in places]).mean()
            loss = loss + weight * term
            parts[name] = term.detach()
        if self._match is not None:
            self._student_states.clear()
            self._teacher_states.clear()
        return loss, parts

    def _terms(self) -> Iterator[tuple[str, float, tuple[tuple[int, int], ...]]]:
        if self.objective.hidden:
            yield "hidden", self.objective.hidden, self._match.layers if self._match else ()
        if self.objective.embedding:
            yield "embedding", self.objective.embedding, ((EMBEDDING, EMBEDDING),)

    def _difference(self, ours: int, theirs: int, counted: Tensor | None) -> Tensor:
        """Return the normalised squared error |s - t|^2 / |t|^2 of hidden states, a mean over the tokens [b, s] that
        are counted."""
        student, teacher = self._student_states[ours], self._teacher_states[theirs]
        if self.channels is not None:
            teacher = teacher.index_select(-1, self.channels)
        exact = torch.promote_types(student.dtype, torch.float32)
        student, teacher = student.to(exact), teacher.to(exact)
        scale = teacher.square().sum(-1).clamp_min(torch.finfo(exact).tiny)
        errors = (student - teacher).square().sum(-1) / scale
        return errors.mean() if counted is None else (errors * counted).sum() / counted.sum().clamp_min(1)


class Head(nn.Module):
    """Both output matrices and the loss between their logits."""

    def __init__(self, teacher: Any, student: Any, objective: Objective):
        super().__init__()
        self.objective = objective
        self.teacher_weight, self.teacher_bias = _frozen_output(teacher)
        output = student.get_output_embeddings()
        self.student_weight, self.student_bias = output.weight, output.bias
        self.rows = min(len(self.teacher_weight), len(self.student_weight))  # as the matrices are before any sharding
        self._forms: dict[str, Any] = {
            "student_logits": logit_form(student.config),
            "teacher_logits": logit_form(teacher.config),
        }

    def forward(
        self, states: Tensor, target: Tensor, labels: Tensor, counted: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the student's and the teacher's hidden states [b, s, h], next tokens [b, s].

        `counted` [b, s]: the positions that it is of, all where None. It is zero where they are none.
        """
        flat = [each.flatten(0, 1) for each in (states, target, labels)]
        if counted is None:
            return self._loss(*flat)
        kept = counted.flatten().nonzero()[:, 0]
        if len(kept):
            return self._loss(*(each[kept] for each in flat))
        loss, parts = self._loss(*(each[:1] for each in flat))  # every parameter gets a gradient, here zero
        return loss * 0.0, {name: part * 0.0 for name, part in parts.items()}

    def _loss(self, states: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of hidden states [t, h] and next tokens [t]."""
        objective = self.objective
        training: dict[str, Any] = {
            "kind": objective.kind,
            "temperature": objective.temperature,
            "cross_entropy": objective.cross_entropy,
        }
        held_out: dict[str, Any] = {"kind": "forward_kl", "temperature": 1.0, "cross_entropy": 0.0}
        return linear_distillation(
            states,
            self._shared(self.student_weight),
            target,
            self._shared(self.teacher_weight),
            beta=objective.beta,
            labels=labels,
            chunk=objective.chunk,
            kernel=objective.kernel,
            student_bias=None if self.student_bias is None else self._shared(self.student_bias),
            teacher_bias=None if self.teacher_bias is None else self._shared(self.teacher_bias),
            **(training if self.training else held_out),
            **self._forms,
        )

    def _shared(self, tensor: Tensor) -> Tensor:
        """Return the rows [v, ...] that teacher and student both have."""
        return tensor if len(tensor) == self.rows else tensor[: self.rows]


def _frozen_output(model: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    output = model.get_output_embeddings().requires_grad_(False)
    return output.weight, output.bias


def _watch(body: Any, places: list[int]) -> dict[int, Tensor]:
    """Return a mapping that holds, after a forward pass of `body`, the hidden states after the named layers."""
    states: dict[int, Tensor] = {}
    for place in set(places):
        if place == EMBEDDING:
            body.layers[0].register_forward_pre_hook(_keep_input(states), with_kwargs=True)
        else:
            body.layers[place].register_forward_hook(_keep_output(states, place))
    return states


def _keep_input(states: dict[int, Tensor]):
    def hook(module: nn.Module, arguments: tuple, named: dict) -> None:
        states[EMBEDDING] = arguments[0] if arguments else named["hidden_states"]

    return hook


def _keep_output(states: dict[int, Tensor], place: int):
    def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
        states[place] = output[0] if isinstance(output, tuple) else output

    return hook


def _check(teacher: Any, student: Any, objective: Objective, match: Match | None) -> None:
    for term in ("hidden", "embedding"):
        if not getattr(objective, term):
            continue
        if match is None:
            raise ValueError(f"distill.loss.{term}: comparing hidden states needs the plan's blueprint; set it to 0")
        width, kept = student.config.hidden_size, match.channels
        if kept is None and width != teacher.config.hidden_size:
            raise ValueError(
                f"distill.loss.{term}: the student has {width} channels, the teacher {teacher.config.hidden_size}, and "
                "no list says which are kept; set it to 0"
            )
        if kept is not None and len(kept) != width:
            raise ValueError(f"distill.loss.{term}: {len(kept)} channels are kept, and the student has {width}")

"""Divergences between a student's and a teacher's next-token distributions, one function each.

With p the teacher's and q the student's probabilities at the temperature T:
  forward KL  sum p (log p - log q)
  reverse KL  sum q (log q - log p)
  JSD(b)      b KL(p | m) + (1 - b) KL(q | m), m = b p + (1 - b) q
  mixed KL    b KL(p | q) + (1 - b) KL(q | p)
(Hinton et al. 2015; Agarwal et al. 2023, generalised JSD). The loss multiplies them by T^2 (Hinton et al. 2015).

A function of DIVERGENCES is a whole divergence: the loss differentiates it by autograd, a chunk of tokens at a time,
and `distill.loss.kind` accepts its name. `pipeline/distill/closed_form.py` and `kernels/fused` hold faster forms of
some of them, which tests compare with these.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The settings that a divergence may read. `beta`: weight of the teacher in a mixture, or of the forward KL."""

    beta: float


Divergence = Callable[[Tensor, Tensor, Options], Tensor]


def forward_kl(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """Return KL(p | q) [t] of log-probabilities [t, v]."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """Return KL(q | p) [t] of log-probabilities [t, v]."""
    return (student.exp() * (student - teacher)).sum(-1)


def jsd(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """Return the generalised Jensen-Shannon divergence [t] of log-probabilities [t, v]."""
    beta = options.beta
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    from_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    from_student = (student.exp() * (student - mixture)).sum(-1)
    return beta * from_teacher + (1.0 - beta) * from_student


def mixed_kl(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """Return beta KL(p | q) + (1 - beta) KL(q | p) [t] of log-probabilities [t, v]."""
    beta = options.beta
    return beta * forward_kl(student, teacher, options) + (1.0 - beta) * reverse_kl(student, teacher, options)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "mixed_kl": mixed_kl,
}


def check_kind(kind: str) -> None:
    """Raise ValueError, with the choices, where no divergence has this name."""
    if kind not in DIVERGENCES:
        raise ValueError(f"distill.loss.kind: {kind!r} is no divergence; choose one of {', '.join(DIVERGENCES)}")

"""The divergence between a student's and a teacher's logits, some rows of tokens at a time, with its gradient in place.

With z student and y teacher logits over the temperature T, q = softmax(z), p = softmax(y), loss T^2 D:
  forward KL  D = sum p (log p - log q)                       dD/dz = q - p
  reverse KL  D = sum q (log q - log p)                       dD/dz = q (log q - log p - D)
  JSD(b)      D = b KL(p|m) + (1 - b) KL(q|m), m = b p + (1 - b) q
                                                              dD/dz = (1 - b) q (log(q/m) - KL(q|m))
(Hinton et al. 2015 for T^2; Agarwal et al. 2023, generalised JSD.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logits:
    """How a model's logits come from `hidden @ weight.T + bias`: times `scale`, then bounded by `softcap` (Gemma 2)."""

    scale: float = 1.0
    softcap: float | None = None


PLAIN = Logits()


@dataclass(frozen=True)
class Terms:
    """What is added up: a divergence at a temperature and, with a weight, the next-token cross entropy.

    `kernel`: a `kl_of_logits` of kernels/fused that computes the divergence; None: the arithmetic written here.
    """

    kind: str
    beta: float
    temperature: float
    cross_entropy: float
    student: Logits
    teacher: Logits
    kernel: Callable[..., Tensor] | None

    @property
    def buffers(self) -> int:
        """How many buffers of logits, in the exact type, a block of rows takes."""
        if self.kernel is None:
            return 6
        return 0 if not self.cross_entropy and self.student == self.teacher == PLAIN else 3


def compare(
    student: Tensor,
    teacher: Tensor,
    aims: tuple[Tensor, Tensor] | None,
    terms: Terms,
    tokens: int,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor | float]:
    """Give the sums of divergence and cross entropy over some rows; leave dloss/dproduct where `student` was.

    `student`, `teacher`: products hidden @ weight.T [rows, v]; `aims`: labels [rows] and shares [rows] that add up over
    the batch to the weight of the cross entropy; `tokens`: of the batch; `buffers`: `terms.buffers` of the same shape.
    """
    return (_by_formula if terms.kernel is None else _by_kernel)(student, teacher, aims, terms, tokens, buffers)


def _by_formula(
    student: Tensor,
    teacher: Tensor,
    aims: tuple[Tensor, Tensor] | None,
    terms: Terms,
    tokens: int,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor | float]:
    z, y, q, p, spare, own = buffers
    _bounded(student, terms.student, z)
    _bounded(teacher, terms.teacher, y)
    entropy = 0.0 if aims is None else _entropy(z, *aims, terms, own)
    if terms.temperature != 1.0:
        z.div_(terms.temperature)
        y.div_(terms.temperature)
    torch.softmax(z, -1, out=q)
    torch.softmax(y, -1, out=p)
    divergence, gradient = DIVERGENCES[terms.kind](terms.beta, z, y, q, p, spare)
    gradient.mul_(terms.temperature / tokens)
    if aims is not None:
        gradient.add_(own)
    _unbounded(gradient, student, terms.student, own)
    student.copy_(gradient)
    return divergence.sum(), entropy


def _by_kernel(
    student: Tensor,
    teacher: Tensor,
    aims: tuple[Tensor, Tensor] | None,
    terms: Terms,
    tokens: int,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor | float]:
    """The kernel leaves the gradient where it read the logits: in the products where these are the logits."""
    scale = terms.temperature**2 / tokens
    if not buffers:
        return terms.kernel(student, teacher, terms.kind, terms.temperature, terms.beta, scale).sum(), 0.0
    z, y, own = buffers
    _bounded(student, terms.student, z)
    _bounded(teacher, terms.teacher, y)
    entropy = 0.0 if aims is None else _entropy(z, *aims, terms, own)
    divergence = terms.kernel(z, y, terms.kind, terms.temperature, terms.beta, scale)
    if aims is not None:
        z.add_(own)
    _unbounded(z, student, terms.student, own)
    student.copy_(z)
    return divergence.sum(), entropy


def _entropy(z: Tensor, labels: Tensor, shares: Tensor, terms: Terms, out: Tensor) -> Tensor:
    """Give the cross entropy of rows of logits, without its weight; leave the weighted gradient in `out`.

    `shares` [rows] add up to the weight over the batch.
    """
    torch.softmax(z, -1, out=out)
    index = labels.clamp_min(0)[:, None]
    entropy = ((_log_sum(z, out) - z.gather(1, index)[:, 0]) * shares).sum() / terms.cross_entropy
    out.mul_(shares[:, None]).scatter_add_(1, index, -shares[:, None])
    return entropy


def _unbounded(gradient: Tensor, product: Tensor, form: Logits, spare: Tensor) -> None:
    """Turn the gradient by the logits into the one by the products they were made of, in place."""
    if form.softcap is not None:
        torch.mul(product, form.scale / form.softcap, out=spare).tanh_().square_()
        gradient.addcmul_(gradient, spare, value=-1.0)
    if form.scale != 1.0:
        gradient.mul_(form.scale)


def _forward_kl(beta: float, z: Tensor, y: Tensor, q: Tensor, p: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    gap = _log_sum(z, q) - _log_sum(y, p)
    return y.sub_(z).mul_(p).sum(-1) + gap, q.sub_(p)


def _reverse_kl(beta: float, z: Tensor, y: Tensor, q: Tensor, p: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    gap = _log_sum(y, p) - _log_sum(z, q)
    z.sub_(y).add_(gap[:, None]).mul_(q)  # q (log q - log p)
    total = z.sum(-1)
    return total, z.addcmul_(q, total[:, None], value=-1.0)


def _jsd(beta: float, z: Tensor, y: Tensor, q: Tensor, p: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    z.sub_(_log_sum(z, q)[:, None])
    y.sub_(_log_sum(y, p)[:, None])
    torch.mul(q, 1.0 - beta, out=spare).add_(p, alpha=beta).clamp_min_(torch.finfo(q.dtype).tiny).log_()  # log m
    from_teacher = y.sub_(spare).mul_(p).sum(-1)
    z.sub_(spare).mul_(q)  # q log(q/m)
    from_student = z.sum(-1)
    gradient = z.addcmul_(q, from_student[:, None], value=-1.0).mul_(1.0 - beta)
    return beta * from_teacher + (1.0 - beta) * from_student, gradient


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Give log sum exp of each row from its softmax: the largest logit less the log of its probability."""
    return logits.amax(-1) - probabilities.amax(-1).log_()


def _bounded(product: Tensor, form: Logits, out: Tensor) -> None:
    out.copy_(product)
    if form.softcap is not None:
        out.mul_(form.scale / form.softcap).tanh_().mul_(form.softcap)
    elif form.scale != 1.0:
        out.mul_(form.scale)

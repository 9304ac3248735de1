"""Divergences with their gradients written out, in preallocated buffers: a fast path of the loss.

With z student and y teacher logits over the temperature, q = softmax(z), p = softmax(y):
  forward KL  dD/dz = q - p
  reverse KL  dD/dz = q (log q - log p - D)
  JSD(b)      dD/dz = (1 - b) q (log(q/m) - KL(q | m)), m = b p + (1 - b) q
  mixed KL    dD/dz = b (q - p) + (1 - b) q (log q - log p - KL(q | p))
Tests compare each with autograd through the function of the same name in `divergences.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]  # D [t] and dD/dz [t, v], in one of the buffers


def forward_kl(beta: float, z: Tensor, y: Tensor, q: Tensor, p: Tensor, spare: Tensor) -> Result:
    """Return KL(p | q) and its gradient. Every tensor is [t, v] and may be overwritten; `spare` holds nothing."""
    gap = log_sum(z, q) - log_sum(y, p)
    return y.sub_(z).mul_(p).sum(-1) + gap, q.sub_(p)


def reverse_kl(beta: float, z: Tensor, y: Tensor, q: Tensor, p: Tensor, spare: Tensor) -> Result:
    """Return KL(q | p) and its gradient; arguments as of `forward_kl`."""
    gap = log_sum(y, p) - log_sum(z, q)
    z.sub_(y).add_(gap[:, None]).mul_(q)  # q (log q - log p)
    total = z.sum(-1)
    return total, z.addcmul_(q, total[:, None], value=-1.0)


def jsd(beta: float, z: Tensor, y: Tensor, q: Tensor, p: Tensor, spare: Tensor) -> Result:
    """Return the generalised Jensen-Shannon divergence and its gradient; arguments as of `forward_kl`."""
    z.sub_(log_sum(z, q)[:, None])
    y.sub_(log_sum(y, p)[:, None])
    torch.mul(q, 1.0 - beta, out=spare).add_(p, alpha=beta).clamp_min_(torch.finfo(q.dtype).tiny).log_()  # log m
    from_teacher = y.sub_(spare).mul_(p).sum(-1)
    z.sub_(spare).mul_(q)  # q log(q/m)
    from_student = z.sum(-1)
    gradient = z.addcmul_(q, from_student[:, None], value=-1.0).mul_(1.0 - beta)
    return beta * from_teacher + (1.0 - beta) * from_student, gradient


def mixed_kl(beta: float, z: Tensor, y: Tensor, q: Tensor, p: Tensor, spare: Tensor) -> Result:
    """Return beta KL(p | q) + (1 - beta) KL(q | p) and its gradient; arguments as of `forward_kl`."""
    gap = log_sum(y, p) - log_sum(z, q)
    z.sub_(y).add_(gap[:, None])  # log q - log p
    forward = -torch.mul(z, p, out=y).sum(-1)
    torch.mul(z, q, out=spare)
    reverse = spare.sum(-1)
    gradient = spare.addcmul_(q, reverse[:, None], value=-1.0).mul_(1.0 - beta)
    gradient.add_(q, alpha=beta).sub_(p, alpha=beta)
    return beta * forward + (1.0 - beta) * reverse, gradient


CLOSED_FORMS: dict[str, Callable[[float, Tensor, Tensor, Tensor, Tensor, Tensor], Result]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "mixed_kl": mixed_kl,
}


def log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Return log sum exp of each row from its softmax: the largest logit less the log of its probability."""
    return logits.amax(-1) - probabilities.amax(-1).log_()

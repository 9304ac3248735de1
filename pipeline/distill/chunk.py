"""The loss of one block of logits and its gradient: by autograd, in closed form, or by a kernel of kernels/fused."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fused
from fused.reference import KINDS
from pipeline.distill.closed_form import CLOSED_FORMS, log_sum
from pipeline.distill.divergences import DIVERGENCES, Options, check_kind
from pipeline.model.logits import PLAIN, LogitForm, shaped

OPERATOR = "kl_of_logits"  # of kernels/fused
AUTOGRAD, CLOSED_FORM = "autograd", "closed_form"
# Tensors of a block of logits, in float32 or better, that a method holds at most: a test counts them.
HELD = {AUTOGRAD: 13, CLOSED_FORM: 6, "reference": 11}
HELD_BY_KERNEL = 3  # none where both models' logits are plain products and there is no cross entropy


@dataclass(frozen=True)
class Terms:
    """What is added up over tokens: a divergence at a temperature and, with a weight, the next-token cross entropy.

    `method`: how, as `method_of` returns it. `student` and `teacher`: what the models do to their logits.
    """

    kind: str
    beta: float
    temperature: float
    cross_entropy: float
    student: LogitForm
    teacher: LogitForm
    method: str

    @property
    def buffers(self) -> int:
        """The number of preallocated buffers that `compare` reads and writes."""
        if self.method == AUTOGRAD:
            return 0
        if self.method == CLOSED_FORM:
            return HELD[CLOSED_FORM]
        return 0 if self._in_place else HELD_BY_KERNEL

    @property
    def held(self) -> int:
        """The number of tensors of the block's size, in float32 or better, that exist at once beside the products."""
        return HELD.get(self.method, self.buffers)

    @property
    def _in_place(self) -> bool:
        return not self.cross_entropy and self.student == self.teacher == PLAIN


def method_of(kind: str, kernel: str, device_type: str) -> str:
    """Return how a divergence is computed: autograd, closed_form, or an implementation of kernels/fused by its name.

    `kernel`, the setting distill.loss.kernel: auto is what the table of kernels/fused names for the device, else the
    closed form, else autograd. ValueError for an unknown kind, and where a chosen kernel cannot run here.
    """
    method = planned_method(kind, kernel, device_type)
    if method in (AUTOGRAD, CLOSED_FORM):
        return method
    try:
        return fused.chosen(OPERATOR, device_type, method)
    except ValueError as error:
        raise ValueError(f"distill.loss.kernel: {kernel}: {error}") from None


def planned_method(kind: str, kernel: str, device_type: str) -> str:
    """Return what `method_of` returns on a machine of that device type where everything is installed."""
    check_kind(kind)
    if kernel == "auto":
        table = fused.DEFAULT[OPERATOR][device_type]
        if kind in KINDS and table != "reference":
            return table
        return CLOSED_FORM if kind in CLOSED_FORMS else AUTOGRAD
    if kernel != AUTOGRAD and kind not in KINDS:
        raise ValueError(f"distill.loss.kernel: {kernel} does not compute {kind}, but {', '.join(KINDS)}; set auto")
    return kernel


def compare(
    student: Tensor,
    teacher: Tensor,
    targets: tuple[Tensor, Tensor] | None,
    terms: Terms,
    tokens: int,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor | float]:
    """Return the sums of divergence and cross entropy over some tokens; leave dloss/dproduct where `student` was.

    `student`, `teacher`: products hidden @ weight.T [t, v]. `targets`: labels [t] and shares [t] that add up over the
    batch to the weight of the cross entropy. `tokens`: of the batch. `buffers`: `terms.buffers` tensors [t, v].
    """
    if terms.method == AUTOGRAD:
        return _by_autograd(student, teacher, targets, terms, tokens)
    if terms.method == CLOSED_FORM:
        return _by_closed_form(student, teacher, targets, terms, tokens, buffers)
    operator = fused.op(OPERATOR, student.device.type, terms.method)
    return _by_operator(operator, student, teacher, targets, terms, tokens, buffers)


def _by_autograd(
    student: Tensor, teacher: Tensor, targets: tuple[Tensor, Tensor] | None, terms: Terms, tokens: int
) -> tuple[Tensor, Tensor | float]:
    exact = torch.promote_types(student.dtype, torch.float32)
    y = torch.log_softmax(shaped(teacher.to(exact), terms.teacher) / terms.temperature, -1)
    with torch.enable_grad():
        product = student.detach().to(exact).requires_grad_()
        z = shaped(product, terms.student)
        log_q = torch.log_softmax(z / terms.temperature, -1)
        divergence = DIVERGENCES[terms.kind](log_q, y, Options(terms.beta)).sum()
        loss = divergence * (terms.temperature**2 / tokens)
        entropy: Tensor | float = 0.0
        if targets is not None:
            labels, shares = targets
            each = torch.nn.functional.cross_entropy(z, labels.clamp_min(0), reduction="none")
            weighted = (each * shares).sum()
            loss, entropy = loss + weighted, weighted.detach() / terms.cross_entropy
    (gradient,) = torch.autograd.grad(loss, product)
    student.copy_(gradient)
    return divergence.detach(), entropy


def _by_closed_form(
    student: Tensor,
    teacher: Tensor,
    targets: tuple[Tensor, Tensor] | None,
    terms: Terms,
    tokens: int,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor | float]:
    z, y, q, p, spare, own = buffers
    _shape_into(z, student, terms.student)
    _shape_into(y, teacher, terms.teacher)
    entropy = 0.0 if targets is None else _cross_entropy(z, *targets, terms, own)
    if terms.temperature != 1.0:
        z.div_(terms.temperature)
        y.div_(terms.temperature)
    torch.softmax(z, -1, out=q)
    torch.softmax(y, -1, out=p)
    divergence, gradient = CLOSED_FORMS[terms.kind](terms.beta, z, y, q, p, spare)
    gradient.mul_(terms.temperature / tokens)
    if targets is not None:
        gradient.add_(own)
    _to_product(gradient, student, terms.student, own)
    student.copy_(gradient)
    return divergence.sum(), entropy


def _by_operator(
    operator: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    targets: tuple[Tensor, Tensor] | None,
    terms: Terms,
    tokens: int,
    buffers: list[Tensor],
) -> tuple[Tensor, Tensor | float]:
    """The operator writes the gradient over the logits it reads: over the products, where these are the logits."""
    scale = terms.temperature**2 / tokens
    if not buffers:
        return operator(student, teacher, terms.kind, terms.temperature, terms.beta, scale).sum(), 0.0
    z, y, own = buffers
    _shape_into(z, student, terms.student)
    _shape_into(y, teacher, terms.teacher)
    entropy = 0.0 if targets is None else _cross_entropy(z, *targets, terms, own)
    divergence = operator(z, y, terms.kind, terms.temperature, terms.beta, scale)
    if targets is not None:
        z.add_(own)
    _to_product(z, student, terms.student, own)
    student.copy_(z)
    return divergence.sum(), entropy


def _cross_entropy(z: Tensor, labels: Tensor, shares: Tensor, terms: Terms, out: Tensor) -> Tensor:
    """Return the cross entropy of logits [t, v], without its weight; leave the weighted gradient in `out`."""
    torch.softmax(z, -1, out=out)
    index = labels.clamp_min(0)[:, None]
    entropy = ((log_sum(z, out) - z.gather(1, index)[:, 0]) * shares).sum() / terms.cross_entropy
    out.mul_(shares[:, None]).scatter_add_(1, index, -shares[:, None])
    return entropy


def _shape_into(out: Tensor, product: Tensor, form: LogitForm) -> None:
    """Write the logits of products into a buffer, without a tensor in between: `shaped`, in place."""
    out.copy_(product)
    if form.softcap is not None:
        out.mul_(form.scale / form.softcap).tanh_().mul_(form.softcap)
    elif form.scale != 1.0:
        out.mul_(form.scale)


def _to_product(gradient: Tensor, product: Tensor, form: LogitForm, spare: Tensor) -> None:
    """Turn the gradient by the logits into the gradient by the products they were made of, in place."""
    if form.softcap is not None:
        torch.mul(product, form.scale / form.softcap, out=spare).tanh_().square_()
        gradient.addcmul_(gradient, spare, value=-1.0)
    if form.scale != 1.0:
        gradient.mul_(form.scale)

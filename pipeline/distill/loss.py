"""The distillation loss, fused with both output matrices: logits exist for one chunk of tokens at a time.

The forward pass computes the gradients too, while the logits exist, so that nothing of size tokens x vocabulary is kept
for the backward pass. Products are computed in the type of their operands, the loss in float32 or better, block by
block (`chunk.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.distill.chunk import Terms, compare, method_of, planned_method
from pipeline.model.logits import PLAIN, LogitForm

IGNORED = -100  # a label that takes no part in the cross entropy
CACHED = 1 << 20  # logits of a block on a CPU: few enough to stay in its caches between passes
RESIDENT = 1 << 25  # logits of a block on an accelerator: enough to fill it, few enough that buffers are small
ADDED_LOW = 4  # chunks whose weight gradients are added in a low precision before float32 takes over


def linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    cross_entropy: float,
    labels: Tensor | None,
    chunk: int,
    kernel: str,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logits: LogitForm = PLAIN,
    teacher_logits: LogitForm = PLAIN,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, a mean over tokens, differentiable by the student's tensors, and its detached parts.

    Hidden states [t, h_student] and [t, h_teacher], output matrices [v, h], biases [v]. `kind`: a name in DIVERGENCES;
    `labels` [t]: the next token of each position or IGNORED, needed where `cross_entropy` (a weight) is positive;
    `chunk`: tokens whose logits exist at once; `kernel`: auto, autograd, reference or triton (see `method_of`).
    Parts: `divergence` (with its T^2) and, where weighted, `cross_entropy`. ValueError where shapes or needs do not
    fit, or the kernel cannot run on the tensors.
    """
    method = method_of(kind, kernel, student_hidden.device.type)
    _check(student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_bias)
    if cross_entropy and labels is None:
        raise ValueError(f"distill.loss.cross_entropy: {cross_entropy} needs labels; pass them, or set 0")
    terms = Terms(kind, beta, temperature, cross_entropy, student_logits, teacher_logits, method)
    loss, divergence, entropy = _LinearDistillation.apply(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, labels, terms, chunk
    )
    return loss, {"divergence": divergence} | ({"cross_entropy": entropy} if cross_entropy else {})


@dataclass(frozen=True)
class WorkSpace:
    """What a loss holds beside a chunk's products: `buffers` float32 tensors of at most `logits` elements each."""

    buffers: int
    logits: int

    def bytes(self, chunk_logits: int) -> int:
        """Return the bytes for a chunk of so many logits."""
        return 4 * self.buffers * min(self.logits, chunk_logits)


def work_space(
    kind: str, kernel: str, device_type: str, cross_entropy: float, student: LogitForm, teacher: LogitForm
) -> WorkSpace:
    """Return the work space of `linear_distillation` on a device type, for estimates made before a run."""
    method = planned_method(kind, kernel, device_type)
    terms = Terms(kind, 0.5, 1.0, cross_entropy, student, teacher, method)
    return WorkSpace(terms.held, _block_logits(device_type))


def _block_logits(device_type: str) -> int:
    return CACHED if device_type == "cpu" else RESIDENT


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, terms, chunk):
        wanted = ctx.needs_input_grad[:3]
        tokens, vocabulary = len(hidden), len(weight)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        size = min(chunk, tokens)
        student, teacher = hidden.new_empty(size, vocabulary), teacher_hidden.new_empty(size, vocabulary)
        rows = max(1, _block_logits(hidden.device.type) // vocabulary)
        buffers = hidden.new_empty(terms.buffers, min(rows, size), vocabulary, dtype=exact)
        divergence, entropy = hidden.new_zeros(2, dtype=exact)
        shares = _entropy_shares(labels, terms.cross_entropy, exact) if terms.cross_entropy else None
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = _Sum(weight) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wanted[2] else None

        for start in range(0, tokens, size):
            part = slice(start, min(start + size, tokens))
            length = part.stop - start
            z = _project(hidden[part], weight, bias, student[:length])
            y = _project(teacher_hidden[part], teacher_weight, teacher_bias, teacher[:length])
            for first in range(0, length, rows):
                some = slice(first, first + rows)
                above = slice(start + first, min(start + first + rows, part.stop))
                targets = (labels[above], shares[above]) if shares is not None else None
                own = [buffer[: above.stop - above.start] for buffer in buffers]
                sums = compare(z[some], y[some], targets, terms, tokens, own)
                divergence += sums[0]
                entropy += sums[1]
            if grad_hidden is not None:
                torch.mm(z, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.add(z, hidden[part])
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=exact)

        ctx.gradients = (
            grad_hidden,
            grad_weight.total() if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
        )
        divergence *= terms.temperature**2 / tokens
        loss = divergence + terms.cross_entropy * entropy
        ctx.mark_non_differentiable(divergence, entropy)
        return loss, divergence, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the distillation loss keeps its gradients for one backward pass; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if each is None else each.mul_(grad_loss) for each in gradients), *[None] * 6


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def _entropy_shares(labels: Tensor, weight: float, dtype: torch.dtype) -> Tensor:
    """Return each token's share [t] of the weighted mean cross entropy, zero where its label is IGNORED."""
    counted = (labels != IGNORED).to(dtype)
    return counted * (weight / counted.sum().clamp_min(1.0))


class _Sum:
    """A sum of products a.T @ b of the shape and type of `like`; of many low-precision terms, added in float32."""

    def __init__(self, like: Tensor):
        self._part = torch.empty_like(like)
        self._terms = 0
        self._exact: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        if self._terms == ADDED_LOW and self._part.dtype.itemsize < 4:
            self._flush()
        torch.addmm(self._part, a.T, b, beta=float(self._terms > 0), out=self._part)
        self._terms += 1

    def total(self) -> Tensor:
        if self._exact is None:
            return self._part
        self._flush()
        return self._exact.to(self._part.dtype)

    def _flush(self) -> None:
        if self._exact is None:
            self._exact = self._part.float()
        else:
            self._exact += self._part
        self._terms = 0


def _check(student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_bias) -> None:
    shapes = [tuple(each.shape) for each in (student_hidden, student_weight, teacher_hidden, teacher_weight)]
    (t, h), (v, w), (s, g), (u, x) = shapes
    if (t, h, g, v) != (s, w, x, u):
        raise ValueError(
            f"student hidden {shapes[0]} and matrix {shapes[1]}, teacher hidden {shapes[2]} and matrix {shapes[3]}: "
            "tokens and vocabulary must agree, and each width with its matrix"
        )
    frozen = (teacher_hidden, teacher_weight, teacher_bias)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in frozen):
        raise ValueError("a teacher tensor requires a gradient, but the teacher is not trained; freeze or detach it")

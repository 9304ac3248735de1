"""The Triton kernels beside their references, values and gradients: interpreted on the CPU, or compiled for a GPU.

Not collected by name: Triton decides at import whether it interprets, so test_kernels_processes.py runs this file in a
process of its own, with TRITON_INTERPRET=1 or with KERNELS_DEVICE=cuda.

Tolerances, relative to the largest element: float32 1e-5 (another order of additions); float16 1.1e-3 and bfloat16
8e-3, the size of one last place (the interpreter truncates float32 to bfloat16 where hardware rounds).
"""

import os

import pytest
import torch

import fused
from fused import budget, reference, triton_launch
from pipeline.distill.chunk import Terms, compare
from pipeline.distill.loss import linear_distillation
from pipeline.model.logits import PLAIN, LogitForm

DEVICE = os.environ.get("KERNELS_DEVICE", "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)
BLOCK = max(footprint.block for footprint in budget.KERNELS.values())
LOGITS = budget.KERNELS["kl_of_logits_rows"].block
# Blocks and a rest, in every dtype; less than a block, and blocks exactly; one row and more rows than programs.
ROWS = [((3, 3, 2 * BLOCK + 22), dtype) for dtype in DTYPES]
ROWS += [((1, 33), torch.float32), ((2, 2, BLOCK), torch.bfloat16)]
VOCABULARY = 2 * LOGITS + 22
each_row = pytest.mark.parametrize("shape,dtype", ROWS)


@pytest.fixture(autouse=True)
def drawn_on_the_device():
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)


def triton(name: str):
    return fused.op(name, DEVICE, "triton")


def agree(name: str, tensors: list[torch.Tensor], *rest, constants: int = 0) -> None:
    """Outputs and gradients of the Triton op equal the reference's; the last `constants` tensors have no gradient."""
    results = []
    for function in (triton(name), getattr(reference, name)):
        inputs = [t.clone().requires_grad_(i < len(tensors) - constants) for i, t in enumerate(tensors)]
        outputs = function(*inputs, *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn(o.shape).to(o.dtype) for o in outputs])
        results.append([*outputs, *(t.grad for t in inputs if t.requires_grad)])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        close(ours, expected, tensors[0].dtype)


def close(ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, places: int = 1) -> None:
    gap = (ours.double() - expected.double()).abs().max()
    assert gap <= places * TOLERANCE[dtype] * expected.double().abs().max(), f"{gap} of {expected.abs().max()}"


@each_row
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape, dtype, offset):
    agree("rms_norm", [torch.randn(shape).to(dtype), torch.randn(shape[-1])], 1e-6, offset)


@each_row
def test_swiglu(shape, dtype):
    agree("swiglu", [3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)])


@each_row
def test_swiglu_packed(shape, dtype):
    agree("swiglu_packed", [torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)])


def test_swiglu_of_two_halves_of_one_tensor():
    packed = torch.randn(3, 5, 2 * (BLOCK + 22))
    assert torch.equal(triton("swiglu")(*packed.chunk(2, -1)), triton("swiglu_packed")(packed))


@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize(
    "tokens,size,batches,dtype",
    [(1, 16, 1, torch.float32), (133, 24, 2, torch.float32), (133, 24, 2, torch.bfloat16), (4, 32, 1, torch.float16)],
)
def test_rotary(tokens, size, batches, mode, dtype):
    x = torch.randn(2, tokens, 3, size).to(dtype).transpose(1, 2)  # as a projection leaves it: tokens outside heads
    agree("rotary", [x, *torch.randn(2, batches, tokens, size).to(dtype)], mode, constants=2)


def test_a_gradient_without_memory_of_its_own_is_read_rightly():
    """The gradient of a sum is one number, expanded: no strides to walk."""
    x, gain = torch.randn(4, 40, requires_grad=True), torch.randn(40)
    ours = torch.autograd.grad(triton("rms_norm")(x, gain, 1e-6, 0.0).sum(), x)[0]
    expected = torch.autograd.grad(reference.rms_norm(x, gain, 1e-6, 0.0).sum(), x)[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize(
    "vocabulary,temperature,beta,dtype",
    [
        (40, 0.7, 0.5, torch.float32), (LOGITS, 2.0, 0.1, torch.float32), (3 * LOGITS + 9, 1.5, 0.9, torch.float32),
        (VOCABULARY, 1.5, 0.5, torch.float16), (VOCABULARY, 1.0, 0.5, torch.bfloat16),
    ],
)  # fmt: skip
def test_kl_of_logits(vocabulary, temperature, beta, kind, dtype):
    student, teacher = (3 * torch.randn(2, 5, vocabulary)).to(dtype)
    ours, expected = student.clone(), student.clone()
    loss = triton("kl_of_logits")(ours, teacher, kind, temperature, beta, 0.2)
    aim = reference.kl_of_logits(expected, teacher, kind, temperature, beta, 0.2)
    close(loss, aim, torch.float32)
    close(ours, expected, dtype)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_kl_of_logits_stands_logits_far_apart(kind):
    """Probabilities that vanish in float32 leave loss and gradient finite; a shift of all logits changes nothing."""
    student, teacher = torch.randn(2, 4, VOCABULARY)
    student[:, 3], teacher[:, LOGITS + 50] = 300.0, 300.0
    moved = student + 1000.0
    losses = [triton("kl_of_logits")(s, teacher, kind, 1.0, 0.5, 1.0) for s in (student, moved)]
    assert torch.isfinite(losses[0]).all() and torch.isfinite(student).all()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_student_logits_may_be_rows_of_a_wider_buffer():
    buffer, teacher = torch.randn(2, 6, VOCABULARY + 10)
    logits, aim = buffer[:, :VOCABULARY], teacher[:, :VOCABULARY]
    inside, rest = logits.clone(), buffer[:, VOCABULARY:].clone()
    loss = triton("kl_of_logits")(logits, aim, "forward_kl", 1.0, 0.5, 1.0)
    torch.testing.assert_close(loss, reference.kl_of_logits(inside, aim, "forward_kl", 1.0, 0.5, 1.0))
    torch.testing.assert_close(logits, inside)
    assert torch.equal(buffer[:, VOCABULARY:], rest)


def test_what_the_kernels_cannot_compute_is_refused():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"float64; choose reference"):
        triton("rms_norm")(x.double(), x[0].double(), 1e-6, 0.0)
    with pytest.raises(ValueError, match=r"gain is \[3\] for rows of 8"):
        triton("rms_norm")(x, x[:, 0], 1e-6, 0.0)
    with pytest.raises(ValueError, match="last axis has 7 elements"):
        triton("swiglu_packed")(x[:, :7])
    with pytest.raises(ValueError, match="strides"):
        triton("kl_of_logits")(torch.randn(8, 3).T, x, "jsd", 1.0, 0.5, 1.0)


def both(kind, dtype, forms, temperature, weight, bias, kernel):
    """Loss, parts and gradients of one batch, its tokens in two chunks."""
    torch.manual_seed(2)
    draw = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    student = [draw(7, 6), draw(VOCABULARY, 6), draw(VOCABULARY) if bias else None]
    teacher = [draw(7, 9), draw(VOCABULARY, 9), draw(VOCABULARY) if bias else None]
    labels = torch.tensor([3, -100, VOCABULARY - 1, 0, 7, 8, -100])
    leaves = [None if each is None else each.requires_grad_() for each in student]
    loss, parts = linear_distillation(
        leaves[0], leaves[1], teacher[0], teacher[1], kind=kind, beta=0.3, temperature=temperature,
        cross_entropy=weight, labels=labels, chunk=4, student_bias=leaves[2], teacher_bias=teacher[2],
        student_logits=forms[0], teacher_logits=forms[1], kernel=kernel,
    )  # fmt: skip
    (1.7 * loss).backward()
    return [loss, *parts.values(), *(each.grad for each in leaves if each is not None)], (student, teacher, labels)


FORMS = [
    (PLAIN, PLAIN),
    (LogitForm(1.3, None), PLAIN),
    (PLAIN, LogitForm(0.8, 5.0)),
    (LogitForm(1.3, 3.0), LogitForm(0.8, 5.0)),
]


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("forms", FORMS)
def test_the_loss_by_the_kernel_is_the_loss_by_pytorch(kind, weight, forms):
    """Values and every gradient; both are themselves compared with autograd (test_loss.py, and below)."""
    cases = [(torch.float32, 2.0, True, 1), (torch.float32, 1.0, False, 1), (torch.bfloat16, 1.5, True, 3)]
    for dtype, temperature, bias, places in cases:  # bfloat16: logits truncated or rounded, then the products rounded
        ours, _ = both(kind, dtype, forms, temperature, weight, bias, "triton")
        expected, _ = both(kind, dtype, forms, temperature, weight, bias, "autograd")
        for one, other in zip(ours, expected, strict=True):
            assert one.dtype == other.dtype and other.abs().max() > 1e-4
            close(one, other, dtype, places)


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_gradients_by_the_kernel_are_autograds_in_float64(kind, weight):
    forms, temperature = (LogitForm(1.3, 3.0), LogitForm(0.8, 5.0)) if weight else (PLAIN, PLAIN), 1.7
    ours, (student, teacher, labels) = both(kind, torch.float32, forms, temperature, weight, True, "triton")
    hidden, matrix, bias = (each.detach().double().requires_grad_() for each in student)

    def logits(hidden, matrix, bias, form):
        product = (hidden @ matrix.T + bias) * form.scale
        return product if form.softcap is None else form.softcap * torch.tanh(product / form.softcap)

    z, y = logits(hidden, matrix, bias, forms[0]), logits(*(each.double() for each in teacher), forms[1])
    log_q, log_p = (each / temperature for each in (z, y))
    log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = (0.3 * p + 0.7 * q).log()
    divergence = (
        {
            "forward_kl": p * (log_p - log_q),
            "reverse_kl": q * (log_q - log_p),
            "jsd": 0.3 * p * (log_p - log_m) + 0.7 * q * (log_q - log_m),
        }[kind]
        .sum(-1)
        .mean()
    )
    loss = temperature**2 * divergence + weight * torch.nn.functional.cross_entropy(z, labels, ignore_index=-100)
    (1.7 * loss).backward()
    for one, other in zip((ours[0], *ours[-3:]), (loss, hidden.grad, matrix.grad, bias.grad), strict=True):
        close(one, other, torch.float32)


def test_plain_logits_are_worked_on_where_the_products_lie():
    """With nothing done to the logits beside the divergence, the kernel gets the products: no copy in float32."""
    plain = Terms("jsd", 0.5, 1.0, 0.0, PLAIN, PLAIN, "triton")
    assert plain.buffers == 0
    products, aim = torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    expected = products.clone()
    loss, entropy = compare(products, aim, None, plain, 3, [])
    assert entropy == 0.0
    close(loss, reference.kl_of_logits(expected, aim, "jsd", 1.0, 0.5, 1 / 3).sum(), torch.float32)
    close(products, expected, torch.bfloat16)


def test_the_triton_loss_refuses_float64():
    hidden, matrix = torch.randn(3, 4).double(), torch.randn(9, 4).double()
    requested = {"kind": "jsd", "beta": 0.5, "temperature": 1.0, "cross_entropy": 0.0, "labels": None, "chunk": 2}
    with pytest.raises(ValueError, match="float64; choose reference"):
        linear_distillation(hidden, matrix, hidden, matrix, kernel="triton", **requested)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has another number of cores")
@pytest.mark.parametrize("jobs,expected", [(1, 1), (3, 3), (10**6, triton_launch.PER_INTERPRETER)])
def test_the_grid_is_the_cores_and_never_more_than_the_jobs(jobs, expected):
    assert triton_launch.programs(torch.device("cpu"), jobs) == expected

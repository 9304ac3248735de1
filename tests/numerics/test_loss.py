"""The fused loss, by every method, against the formulas written down plainly, in float64."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy as entropy

import fused as table
import fused.reference
from pipeline.distill.chunk import method_of
from pipeline.distill.closed_form import CLOSED_FORMS
from pipeline.distill.divergences import DIVERGENCES
from pipeline.distill.loss import ADDED_LOW, IGNORED, linear_distillation
from pipeline.model.logits import PLAIN, LogitForm
from tests.watching import calls_of

KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed_kl")
KERNELS = ("autograd", "auto", "reference")  # on a CPU auto is the closed form
RUN = [(kind, kernel) for kind in KINDS for kernel in KERNELS if kind in table.reference.KINDS or kernel != "reference"]
TOKENS, STUDENT, TEACHER, VOCABULARY = 13, 6, 9, 31


def logits(hidden, weight, bias, form):
    product = (hidden @ weight.T + (0 if bias is None else bias)) * form.scale
    return product if form.softcap is None else form.softcap * torch.tanh(product / form.softcap)


def divergence(kind, beta, z, y):
    """D between teacher logits y and student logits z, [t]."""
    log_q, log_p = torch.log_softmax(z, -1), torch.log_softmax(y, -1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "mixed_kl":
        return ((beta * p - (1 - beta) * q) * (log_p - log_q)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def plain(student, teacher, *, kind, beta, temperature, cross_entropy, labels, forms):
    """The loss with every logit at once; `student` and `teacher` are (hidden, weight, bias)."""
    z, y = logits(*student, forms[0]), logits(*teacher, forms[1])
    loss = temperature**2 * divergence(kind, beta, z / temperature, y / temperature).mean()
    return loss + cross_entropy * entropy(z, labels, ignore_index=IGNORED)


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def case():
    student = (draw(TOKENS, STUDENT, seed=1), draw(VOCABULARY, STUDENT, seed=2), draw(VOCABULARY, seed=3))
    teacher = (draw(TOKENS, TEACHER, seed=4), draw(VOCABULARY, TEACHER, seed=5), draw(VOCABULARY, seed=6))
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(7))
    labels[[3, 8]] = IGNORED
    return student, teacher, labels


def fused(student, teacher, labels, forms=(PLAIN, PLAIN), **options):
    plain_options = {"kind": "forward_kl", "beta": 0.3, "temperature": 1.0, "cross_entropy": 0.0, "chunk": 4}
    options = plain_options | {"kernel": "auto"} | options
    return linear_distillation(
        student[0],
        student[1],
        teacher[0],
        teacher[1],
        labels=labels,
        student_bias=student[2],
        teacher_bias=teacher[2],
        student_logits=forms[0],
        teacher_logits=forms[1],
        **options,
    )


def leaves(tensors):
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize(("kind", "kernel"), RUN)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_are_those_of_the_plain_formula(kind, softcap, kernel):
    student, teacher, labels = case()
    forms = (LogitForm(1.3, softcap), LogitForm(0.8, softcap and 5.0))
    for temperature, weight, chunk in itertools.product((1.0, 2.5), (0.0, 0.7), (5, 100)):
        ours, theirs = leaves(student), leaves(student)
        requested = {"kind": kind, "beta": 0.3, "temperature": temperature, "cross_entropy": weight}
        loss, parts = fused(ours, teacher, labels, forms, chunk=chunk, kernel=kernel, **requested)
        wanted = plain(theirs, teacher, labels=labels, forms=forms, **requested)
        (1.7 * loss).backward()
        (1.7 * wanted).backward()
        assert abs(loss - wanted) < 1e-10
        assert abs(parts["divergence"] + weight * parts.get("cross_entropy", 0.0) - wanted) < 1e-10
        for one, other in zip(ours, theirs):
            assert other.grad.abs().max() > 1e-3, "the case must have a gradient to compare"
            assert (one.grad - other.grad).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_entry_is_the_finite_difference_of_the_loss(kind):
    student, teacher, labels = case()
    requested = {
        "kind": kind,
        "temperature": 1.5,
        "cross_entropy": 0.4,
        "chunk": 100,
        "forms": (LogitForm(1.0, 4.0), PLAIN),
    }
    ours = leaves(student)
    fused(ours, teacher, labels, **requested)[0].backward()
    with torch.no_grad():
        for place, tensor in enumerate(student):
            slopes = torch.zeros_like(tensor)
            for entry in range(tensor.numel()):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = [each.clone() for each in student]
                    moved[place].view(-1)[entry] += step
                    ends.append(fused(moved, teacher, labels, **requested)[0])
                slopes.view(-1)[entry] = (ends[0] - ends[1]) / 2e-5
            assert (slopes - ours[place].grad).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(kind):
    _, teacher, labels = case()
    student = leaves(teacher)
    loss, _ = fused(student, teacher, labels, kind=kind)
    loss.backward()
    assert abs(loss) < 1e-12
    assert all(tensor.grad.abs().max() < 1e-12 for tensor in student)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart_give_finite_losses_and_gradients(kind):
    student, teacher, labels = case()
    ours = leaves(tensor.float() * 40 for tensor in student)
    loss, _ = fused(ours, tuple(-40 * tensor.float() for tensor in teacher), labels, kind=kind, cross_entropy=0.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(tensor.grad).all() and tensor.grad.abs().max() > 0 for tensor in ours)


def test_a_matrix_that_is_used_elsewhere_too_gets_the_sum_of_its_gradients():
    student, teacher, labels = case()
    hidden, weight, bias = leaves(student)
    loss, _ = fused((hidden, weight, bias), teacher, labels)
    (loss + (weight[:TOKENS] * hidden).sum()).backward()
    alone = leaves(student)
    fused(alone, teacher, labels)[0].backward()
    extra = torch.zeros_like(weight)
    extra[:TOKENS] = student[0]
    assert torch.allclose(weight.grad, alone[1].grad + extra, atol=1e-12)


def test_bf16_gradients_of_many_chunks_are_as_good_as_of_one():
    """Terms of a bf16 sum beyond ADDED_LOW go to float32: the error stays that of rounding once or twice."""
    tokens, width, vocabulary = 64 * ADDED_LOW, 16, 48
    student = (draw(tokens, width, seed=1), draw(vocabulary, width, seed=2), None)
    teacher = (draw(tokens, width, seed=3), draw(vocabulary, width, seed=4), None)
    low = [tuple(None if t is None else t.bfloat16() for t in each) for each in (student, teacher)]
    wanted = leaves(t.double() for t in low[0][:2])
    fused((*wanted, None), [None if t is None else t.double() for t in low[1]], None, chunk=tokens)[0].backward()
    errors = []
    for chunk in (tokens, 8):
        ours = leaves(low[0][:2])
        fused((*ours, None), low[1], None, chunk=chunk)[0].backward()
        errors.append(float((ours[1].grad.double() - wanted[1].grad).norm() / wanted[1].grad.norm()))
    assert errors[0] < 0.01
    assert errors[1] < 1.5 * errors[0]


def test_no_gradient_is_computed_where_none_is_asked():
    student, teacher, labels = case()
    with torch.no_grad():
        loss, _ = fused(leaves(student), teacher, labels)
    assert not loss.requires_grad
    ours = (student[0].clone().requires_grad_(), student[1], None)
    fused(ours, teacher, labels)[0].backward()
    assert ours[0].grad.abs().max() > 1e-3


def test_a_second_backward_pass_is_refused():
    student, teacher, labels = case()
    loss, _ = fused(leaves(student), teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cosine"}, "distill.loss.kind.*'cosine'.*forward_kl, reverse_kl, jsd"),
        ({"cross_entropy": 0.5, "labels": None}, "distill.loss.cross_entropy: 0.5 .*labels"),
        ({"teacher": 0}, r"\(31, 6\).*\(30, 9\)"),
        ({"teacher": 1}, "teacher tensor requires a gradient"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(change, message):
    student, teacher, labels = case()
    fault = change.pop("teacher", None)
    if fault == 0:
        teacher = (teacher[0], teacher[1][:-1], None)
    if fault == 1:
        teacher = leaves(teacher)
    with pytest.raises(ValueError, match=message):
        fused(leaves(student), teacher, **({"labels": labels} | change))


def test_every_fast_form_has_its_function():
    assert set(CLOSED_FORMS) | set(table.reference.KINDS) <= set(DIVERGENCES)


@pytest.mark.parametrize("kind", table.reference.KINDS)
def test_reference_runs_what_the_kernels_folder_holds(kind):
    student, teacher, labels = case()
    with calls_of(table.reference.kl_of_logits) as calls:
        fused(leaves(student), teacher, labels, kind=kind, chunk=100, kernel="reference")
        fused(leaves(student), teacher, labels, kind=kind, chunk=100, kernel="auto")
    assert [given["kind"] for given in calls] == [kind]


@pytest.mark.parametrize("device,kernel", [("cpu", "triton"), ("npu", "triton"), ("cpu", "ascend"), ("cpu", "other")])
def test_a_kernel_that_cannot_run_is_refused_and_nothing_takes_its_place(device, kernel, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"distill.loss.kernel: {kernel}: kernel kl_of_logits"):
        method_of("jsd", kernel, device)


def test_the_table_names_the_method_of_a_device():
    assert [method_of("jsd", "auto", device) for device in ("cpu", "npu")] == ["closed_form", "closed_form"]
    assert table.DEFAULT["kl_of_logits"]["cuda"] == "triton"

"""The distiller against plain transformers models, the schedule, the hold-out and the loop."""


import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.distill.distiller import Distiller, Match, Objective
from tests.tiny import tiny_model, tokens

PLAIN = {"kind": "forward_kl", "beta": 0.5, "temperature": 1.0, "cross_entropy": 0.0, "hidden": 0.0, "embedding": 0.0}
NARROW = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
MATCH = Match(((0, 1), (1, 3)), tuple(range(3, 27)))


def objective(**changed):
    return Objective(**{**PLAIN, "chunk": 7, "kernel": "auto", **changed})


def pair(kind, **changed):
    teacher = tiny_model(kind, seed=0)
    return teacher, tiny_model(kind, seed=1, **({"num_hidden_layers": 2} | changed))


def plain_loss(teacher, student, requested, match, batch):
    """The objective from whole models, their logits and the hidden states they give."""
    with torch.no_grad():
        theirs = teacher(batch, output_hidden_states=True)
    ours = student(batch, output_hidden_states=True)
    log_q = torch.log_softmax(ours.logits / requested.temperature, -1)
    log_p = torch.log_softmax(theirs.logits / requested.temperature, -1)
    first, second = (log_p, log_q) if requested.kind == "forward_kl" else (log_q, log_p)
    loss = requested.temperature**2 * (first.exp() * (first - second)).sum(-1).mean()
    loss = loss + requested.cross_entropy * cross_entropy(ours.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    channels = list(range(teacher.config.hidden_size)) if match is None else list(match.channels)

    def difference(s, t):
        t = t[..., channels]
        return ((s - t).square().sum(-1) / t.square().sum(-1)).mean()

    if requested.embedding:
        loss = loss + requested.embedding * difference(ours.hidden_states[0], theirs.hidden_states[0])
    if requested.hidden:  # the model's last state is normed: the state before the norm is taken from a hook
        states = [difference(last_states(student, batch, a), last_states(teacher, batch, b)) for a, b in match.layers]
        loss = loss + requested.hidden * sum(states) / len(states)
    return loss


def last_states(model, batch, layer):
    kept = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda module, arguments, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    model.model(batch)
    hook.remove()
    return kept[0]


def narrow(model, rows):
    """Return the output matrix, its bias if it has one, without the rows behind the first."""
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight[:rows].detach().clone())
    if output.bias is not None:
        output.bias = torch.nn.Parameter(output.bias[:rows].detach().clone())
    return model


@pytest.mark.parametrize("sizes", [(96, 120), (120, 96)])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_rows_that_one_model_alone_has_take_no_part(kind, sizes):
    """Qwen 2.5's larger models have more rows than its smaller ones, and the same tokens."""
    requested = objective(kind="reverse_kl", cross_entropy=0.5)
    teacher, student = (tiny_model(kind, seed=seed, vocab_size=size) for seed, size in enumerate(sizes))
    same = [narrow(tiny_model(kind, seed=seed, vocab_size=size), 96) for seed, size in enumerate(sizes)]
    results = []
    for models in ((teacher, student), same):
        distiller = Distiller(*models, requested, None, False).train()
        loss, _ = distiller(tokens())
        loss.backward()
        results.append((loss.detach(), {name: each.grad for name, each in distiller.parameters_by_name()}))
    (loss, gradients), (wanted, expected) = results
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        rows = len(expected[name])
        torch.testing.assert_close(gradient[:rows], expected[name], rtol=1e-10, atol=1e-14)
        assert not gradient[rows:].any(), name


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "qwen2"])
@pytest.mark.parametrize("requested", [{}, {"kind": "reverse_kl", "temperature": 2.0, "cross_entropy": 0.5}])
def test_the_loss_and_every_gradient_are_those_of_the_whole_models(kind, requested):
    teacher, student = pair(kind)
    batch = tokens()
    requested = objective(**requested)
    wanted = plain_loss(teacher, student, requested, None, batch)
    gradients = dict(zip([n for n, _ in student.named_parameters()], torch.autograd.grad(wanted, student.parameters())))
    distiller = Distiller(teacher, student, requested, None, False).train()
    loss, _ = distiller(batch)
    loss.backward()
    assert abs(loss - wanted) < 1e-10
    named = dict(distiller.parameters_by_name())
    assert set(named) == set(gradients)
    for name, parameter in named.items():
        assert (parameter.grad - gradients[name]).abs().max() < 1e-9, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_state_terms_compare_the_kept_channels_of_the_mapped_layers(checkpointing):
    teacher, student = pair("llama", **NARROW)
    requested = objective(hidden=0.6, embedding=0.3)
    batch = tokens()
    wanted = plain_loss(teacher, student, requested, MATCH, batch)
    gradients = torch.autograd.grad(wanted, student.parameters())
    distiller = Distiller(teacher, student, requested, MATCH, checkpointing).train()
    loss, parts = distiller(batch)
    loss.backward()
    assert abs(loss - wanted) < 1e-10
    assert abs(parts["divergence"] + 0.6 * parts["hidden"] + 0.3 * parts["embedding"] - loss) < 1e-10
    for gradient, parameter in zip(gradients, student.parameters()):
        assert (parameter.grad - gradient).abs().max() < 1e-7  # the models' norms compute in float32


def test_evaluation_gives_the_forward_kl_whatever_is_trained():
    teacher, student = pair("llama")
    batch = tokens()
    wanted = plain_loss(teacher, student, objective(), None, batch)
    requested = objective(kind="jsd", temperature=3.0, cross_entropy=1.0)
    _, parts = Distiller(teacher, student, requested, None, False).eval()(batch)
    assert abs(parts["kl"] - wanted) < 1e-10


def test_the_teacher_is_frozen_and_stays_in_evaluation_mode():
    teacher, student = pair("llama")
    distiller = Distiller(teacher, student, objective(), None, False).train()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert distiller.student.training and distiller.head.training and not distiller.teacher.training


@pytest.mark.parametrize(
    ("student", "requested", "match", "message"),
    [
        ({}, {"hidden": 1.0}, None, "needs the plan's blueprint"),
        (NARROW, {"embedding": 1.0}, Match(((0, 0),), None), "no list says which are kept"),
        (NARROW, {"hidden": 1.0}, Match(((0, 0),), (1, 2)), "2 channels are kept"),
    ],
)
def test_models_and_terms_that_do_not_fit_are_refused(student, requested, match, message):
    teacher, student = pair("llama", **student)
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, objective(**requested), match, False)

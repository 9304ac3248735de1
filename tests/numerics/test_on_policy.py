"""On-policy distillation: answers are the student's own, and their loss is the plain one of the answers alone."""

import pytest
import torch

from pipeline.distill.distiller import Objective
from pipeline.distill.on_policy import Drawing, OnPolicyDistiller, Written, answered
from pipeline.distill.schedule import answer_length
from pipeline.model.marks import ids_of, positions
from tests.tiny import tiny_model, tokens

PROMPTS = [tokens(1, length, seed=length)[0] for length in (7, 3, 11, 3)]
NEVER = frozenset({-1})


def distiller(kind="llama", divergence="reverse_kl", marked=True, temperature=1.0):
    objective = Objective(divergence, 0.3, temperature, 0.0, 0.0, 0.0, chunk=5, kernel="auto")
    teacher, student = tiny_model(kind), tiny_model(kind, seed=1)
    return OnPolicyDistiller(teacher, student, objective, False, marked), teacher, student


def predictor(module):
    """Return what an engine's `predict` does, in one process without partitions."""

    def predict(ids, written):
        module.eval()
        with torch.no_grad():
            logits = module(ids, written)
        module.train()
        return logits

    return predict


def write(module, prompts=PROMPTS, count=6, temperature=1.0, stop=NEVER, seeds=None, goes_on=lambda writes: writes):
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds or range(len(prompts)))]
    return answered(predictor(module), prompts, generators, Drawing(count, temperature, stop), goes_on)


def answers(written, prompts=PROMPTS):
    """Return the ids that a loss counts, by row; the prompts before them are unchanged."""
    found = []
    for row, prompt in zip(written, prompts, strict=True):
        assert ids_of(row[: len(prompt)]).tolist() == prompt.tolist() and bool((row[: len(prompt)] < 0).all())
        own = row[len(prompt) :]
        found.append(own[own >= 0].tolist())
        assert bool((own[: len(found[-1])] >= 0).all()), "an answer is one run"
    return found


@pytest.mark.parametrize("kind", ["llama-tied", "gemma2", "gpt2", "bloom", "lfm2"])
def test_without_temperature_the_answers_are_those_of_generate(kind):
    """Prompts of different lengths in one batch, without padding; an answer ends with an id that ends it."""
    module, _, student = distiller(kind)
    whole = [greedy(student, prompt, None) for prompt in PROMPTS]
    assert answers(write(module, temperature=0.0)) == whole
    end = whole[0][3]
    cut = [greedy(student, prompt, end) for prompt in PROMPTS]
    assert len(cut[0]) < 6 and answers(write(module, temperature=0.0, stop=frozenset({end}))) == cut


def greedy(student, prompt, end):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    whole = student.eval().generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
    return whole[0, len(prompt) :].tolist()


def test_an_answer_depends_on_its_own_seed_and_on_no_other_row():
    module = distiller()[0]
    together = answers(write(module))
    for row, prompt in enumerate(PROMPTS):
        assert answers(write(module, [prompt], seeds=[row]), [prompt]) == together[row : row + 1]
    assert answers(write(module, seeds=[9, 9, 9, 9])) != together
    assert together[1] != answers(write(module, [PROMPTS[1]], seeds=[7]), [PROMPTS[1]])[0]


def test_a_rank_that_has_finished_runs_passes_until_all_have():
    module, further = distiller()[0], iter([True] * 3)
    passes = []
    predict = predictor(module)
    found = answered(
        lambda ids, written: passes.append(tuple(ids.shape)) or predict(ids, written),
        PROMPTS[:1],
        [torch.Generator().manual_seed(0)],
        Drawing(2, 1.0, NEVER),
        lambda writes: writes or next(further, False),
    )
    assert passes == [(1, 7), (1, 1), (1, 1), (1, 1), (1, 1)]
    assert found.tolist() == write(module, PROMPTS[:1], 2).tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "mixed_kl"])
def test_the_loss_and_every_gradient_are_those_of_whole_models_on_the_answers(kind, divergence):
    """In float64, by autograd through whole logits at the positions that predict a token of an answer."""
    module, teacher, student = distiller(kind, divergence)
    batch = write(module, stop=frozenset(range(0, 96, 7)))
    lengths = [len(answer) for answer in answers(batch)]
    assert len(set(lengths)) > 1
    ids, rows, places = ids_of(batch), [], []
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        rows += [row] * length
        places += range(len(prompt) - 1, len(prompt) - 1 + length)
    z, y = (model(ids).logits[rows, places].log_softmax(-1) for model in (student, teacher))
    forward, reverse = (y.exp() * (y - z)).sum(-1).mean(), (z.exp() * (z - y)).sum(-1).mean()
    wanted = reverse if divergence == "reverse_kl" else 0.3 * forward + 0.7 * reverse
    expected = torch.autograd.grad(wanted, list(student.parameters()))
    loss, _ = module(batch)
    loss.backward()
    assert abs(loss - wanted) < 1e-10
    for (name, parameter), gradient in zip(student.named_parameters(), expected, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-9, name
        assert parameter.grad.abs().max() > 0, name


def test_no_gradient_comes_from_a_prompt():
    """The loss does not depend on what the student predicts for tokens of the prompt, or behind an answer's end."""
    module, states = distiller()[0], []
    batch = write(module, stop=frozenset(range(0, 96, 7)))

    def keep(_, arguments, output):
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    module.student.register_forward_hook(keep)
    module(batch)[0].backward()
    counted = positions(batch)
    assert counted.any() and not counted.all()
    assert not states[0].grad[~counted].any() and bool((states[0].grad[counted].abs().sum(-1) > 0).all())


@pytest.mark.parametrize("marked", [False, True])
def test_held_out_text_is_measured_as_during_recovery(marked):
    """Forward KL at temperature 1; text without marks counts every position."""
    module, teacher, student = distiller(marked=marked)
    batch = torch.where(torch.arange(12) < 4, ~tokens(), tokens()) if marked else tokens()
    counted = positions(batch) if marked else torch.ones_like(batch, dtype=torch.bool)
    z, y = (model(ids_of(batch)).logits[counted].log_softmax(-1) for model in (student, teacher))
    module.eval()
    assert abs(module(batch)[1]["kl"] - (y.exp() * (y - z)).sum(-1).mean()) < 1e-10


def test_only_ids_that_both_models_have_are_written():
    teacher, student = tiny_model("llama", vocab_size=40), tiny_model("llama", seed=1)
    objective = Objective("reverse_kl", 0.5, 1.0, 0.0, 0.0, 0.0, chunk=5, kernel="auto")
    module = OnPolicyDistiller(teacher, student, objective, False, True).eval()
    assert module(tokens(2, vocabulary=40), Written()).shape == (2, 40)


def test_answers_grow_from_the_shortest_to_the_longest():
    lengths = [answer_length(step, 8, 32, 256) for step in range(8)]
    assert lengths == sorted(lengths) and (lengths[0], lengths[-1]) == (32, 256)
    assert sum(lengths) <= 8 * (32 + 256) / 2
    assert answer_length(0, 1, 32, 256) == 32 and answer_length(3, 8, 5, 5) == 5

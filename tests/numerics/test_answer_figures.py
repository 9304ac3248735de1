"""Figures of the assistant's turns are those of the counted positions of whole models, in float64."""

import math

import pytest
import torch

from pipeline.evaluation.answers import compared, equal, figures, greedy, greedy_figures, shared, turns_of
from pipeline.evaluation.samples import continue_greedily
from pipeline.model.marks import ids_of, positions
from pipeline.report.answers import answer_lines
from tests.tiny import tiny_model, tokens


def marks(rows=3):
    ids = tokens(rows)
    counted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    counted[1] = False
    return torch.where(counted, ids, ~ids)


def test_sums_are_those_of_the_counted_positions_whatever_the_batches():
    reference, student, rows = tiny_model("llama").eval(), tiny_model("llama", seed=1).eval(), marks()
    counted, labels = positions(rows), ids_of(rows).roll(-1, 1)[positions(rows)]
    with torch.no_grad():
        y, z = (model(ids_of(rows)).logits[counted].log_softmax(-1) for model in (reference, student))
    sums = torch.cat(list(compared(reference, student, [rows[:2], rows[2:]], 3)))
    assert sums[1].tolist() == [0.0] * 7 and int(sums[:, -1].sum()) == int(counted.sum())
    found = figures(sums)
    assert abs(found["kl"] - float((y.exp() * (y - z)).sum(-1).mean())) < 1e-12
    assert found["agreement"] == pytest.approx(float((y.argmax(-1) == z.argmax(-1)).double().mean()))
    for who, each in (("teacher", y), ("student", z)):
        loss = float(-each.gather(1, labels[:, None]).mean())
        assert abs(found[who]["loss"] - loss) < 1e-12 and abs(found[who]["perplexity"] - math.exp(loss)) < 1e-9
    per_token = (y.exp() * (y - z)).sum(-1)
    rows_of = counted.nonzero()[:, 0]
    deviations = [(per_token[rows_of == row] - found["kl"]).sum() for row in range(3)]
    assert found["kl_error"] == pytest.approx(float(torch.stack(deviations).square().sum().sqrt()) / found["tokens"])


def test_a_model_agrees_with_itself():
    model, rows = tiny_model("llama").eval(), marks()
    found = figures(torch.cat(list(compared(model, model, [rows], 5))))
    assert (found["kl"], found["agreement"]) == (0.0, 1.0)
    turns = turns_of(rows, frozenset(), None, 9)
    written = greedy(model, turns, 4)
    same = greedy_figures(equal(written, written), 4)
    assert same == {"answers": len(turns), "tokens": 4, "identical": 1.0, "shared": 1.0}
    lines = answer_lines("chats", found | {"greedy": same})
    assert [line[2] for line in lines[-2:]] == ["100.0%", "100.0%"] and len(lines) == 5
    assert figures(torch.zeros(2, 7)) is None and greedy_figures(torch.zeros(3), 4) is None


def test_a_turn_begins_behind_the_prompt_and_ends_where_the_row_says():
    row = torch.tensor([~1, ~7, ~8, 20, 21, 9, ~7, 30, 9, ~1])
    document, cut = torch.tensor([1, 5, 6]), torch.tensor([~1, ~8, 20])
    (first, last) = turns_of([document, row, cut, row], frozenset({9}), 2, 2)
    assert first.prompt.tolist() == [[1, 7, 8]] and first.stop == {9, 2}
    assert last.prompt.tolist() == [[1, 8]] and last.stop == {2}
    assert first.answer.tolist() == [20, 21, 9] and last.answer.tolist() == [20]
    assert turns_of([row], frozenset(), None, 1)[0].stop == frozenset()


def test_greedy_answers_are_those_of_each_model():
    reference, student = tiny_model("llama").eval(), tiny_model("llama", seed=1).eval()
    turns = turns_of(marks(), frozenset(), 2, 9)
    answers = [[continue_greedily(each, turn.prompt, 6, turn.stop) for each in (reference, student)] for turn in turns]
    found = equal(*(greedy(each, turns, 6) for each in (reference, student)))
    assert found.tolist() == [sum(a == b for a, b in answers), sum(shared(a, b) for a, b in answers), len(turns)]
    assert (shared([1, 2, 3], [1, 2]), shared([], []), shared([1], [2]), shared([], [1])) == (2 / 3, 1.0, 0.0, 0.0)

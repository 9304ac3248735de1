"""A marked loss is the loss of the positions that the marks count, however a step is split over batches and ranks."""

import numpy as np
import pytest
import torch

from pipeline.distill.distiller import Distiller, Match, Objective
from pipeline.distill.holdout import share_out
from pipeline.distill.loop import Course, train
from pipeline.distill.next_token import LanguageModel, next_tokens
from pipeline.distill.selection import Selection
from pipeline.model.logits import logits_of
from pipeline.model.marks import ids_of, marked, positions
from tests.tiny import tiny_model, tokens

PLAIN = {"kind": "forward_kl", "beta": 0.5, "temperature": 1.0, "cross_entropy": 0.0, "hidden": 0.0, "embedding": 0.0}
MATCH = Match(((0, 1), (3, 3)), None)
TERMS = [
    {},
    {"kind": "reverse_kl", "cross_entropy": 0.5},
    {"kind": "jsd", "kernel": "autograd", "cross_entropy": 0.3},
    {"hidden": 0.6, "embedding": 0.3},
]


def marks(rows=4, seed=1, share=0.4):
    """Return marked tokens [rows, 12], one row without a counted token."""
    counted = torch.rand(rows, 12, generator=torch.Generator().manual_seed(seed)) < share
    counted[1] = False
    ids = tokens(rows, seed=seed)
    return torch.where(counted, ids, ~ids)


def distiller(**changed):
    objective = Objective(**{**PLAIN, "chunk": 5, "kernel": "auto", **changed})
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    return Distiller(teacher, student, objective, MATCH, False, marked=True).train(), teacher, student


def gradients(loss, module):
    own = [parameter for _, parameter in module.parameters_by_name()]
    return torch.autograd.grad(loss, own, retain_graph=True)


def test_marks_keep_the_ids():
    ids, counted = np.array([0, 1, 2, 95], dtype=np.int32), np.array([True, False, False, True])
    stored = marked(ids, counted)
    assert stored.tolist() == [0, -2, -3, 95] and ids_of(stored).tolist() == ids.tolist()
    batch = torch.from_numpy(stored).long()[None]
    assert ids_of(batch).tolist() == [ids.tolist()] and ids_of(ids).tolist() == ids.tolist()
    assert positions(batch).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("changed", TERMS)
def test_the_loss_is_that_of_the_counted_positions(changed):
    """In float64, against whole logits: divergence, cross entropy and hidden-state terms."""
    module, teacher, student = distiller(**changed)
    batch = marks()
    ids, counted = ids_of(batch), positions(batch)
    loss, parts = module(batch)
    outputs = [model(ids, output_hidden_states=True) for model in (student, teacher)]
    z, y = (output.logits[counted].log_softmax(-1) for output in outputs)
    kind = changed.get("kind", "forward_kl")
    mix = torch.logsumexp(torch.stack([z, y]), 0) - np.log(2.0)
    wanted = {
        "forward_kl": (y.exp() * (y - z)).sum(-1).mean(),
        "reverse_kl": (z.exp() * (z - y)).sum(-1).mean(),
        "jsd": 0.5 * ((y.exp() * (y - mix)).sum(-1) + (z.exp() * (z - mix)).sum(-1)).mean(),
    }[kind]
    labels = next_tokens(ids)[counted]
    wanted = wanted + changed.get("cross_entropy", 0.0) * -z.gather(1, labels[:, None]).mean()
    if "hidden" in changed:
        (ours, theirs) = (output.hidden_states for output in outputs)
        error = lambda s, t: ((s - t).square().sum(-1) / t.square().sum(-1))[counted].mean()  # noqa: E731
        states = [error(ours[0], theirs[0])]
        wanted = wanted + changed["embedding"] * states[0]
        assert abs(parts["embedding"] - states[0]) < 1e-12
        wanted = wanted + changed["hidden"] * parts["hidden"]
    assert abs(loss - wanted) < 1e-10
    assert all(gradient.abs().max() > 0 for gradient in gradients(loss, module))


def test_nothing_counted_is_no_loss_and_no_gradient():
    module, _, _ = distiller(cross_entropy=0.5)
    loss, parts = module(~tokens())
    assert loss == 0.0 and not any(parts.values())
    assert not any(gradient.any() for gradient in gradients(loss, module))


def test_everything_counted_is_the_loss_without_marks_but_for_the_last_position():
    module, teacher, student = distiller()
    loss, _ = module(tokens())
    z, y = (model(tokens()).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    assert abs(loss - (y.exp() * (y - z)).sum(-1).mean()) < 1e-10


def test_the_next_token_loss_is_that_of_the_counted_tokens():
    module, batch = LanguageModel(tiny_model("llama"), 5, False), marks()
    ids, counted = ids_of(batch), positions(batch)
    model = tiny_model("llama")
    wanted = torch.nn.functional.cross_entropy(
        logits_of(model, model.model(ids)[0])[counted], next_tokens(ids)[counted]
    )
    assert abs(module(batch)[0] - wanted) < 1e-10


class Summing:
    """An engine of one rank of several, in one process: it keeps the gradients of a step as DeepSpeed averages them."""

    def __init__(self, module, accumulation, counts):
        self.module, self.accumulation, self.counts, self.total = module, accumulation, counts, None

    def backward(self, batch, weight=1.0):
        loss, parts = self.module(batch)
        grown = [gradient / self.accumulation for gradient in gradients(loss * weight, self.module)]
        self.total = grown if self.total is None else [a + b for a, b in zip(self.total, grown)]
        return {"loss": loss.detach(), **parts}

    def step(self, rate):
        return 1.0

    def measure(self, batch):
        return {}

    def average(self, values):
        if "counted" in values:
            return {"counted": self.counts}
        return {name: float(value) for name, value in values.items()}


def step(batches, ranks):
    """Return the mean over ranks of the loss and the gradients of one step, its micro-batches dealt to the ranks."""
    counts = sum(int(positions(batch).sum()) for batch in batches) / ranks
    losses, grown = [], []
    for rank in range(ranks):
        own, kept = batches[rank::ranks], []
        engine = Summing(distiller(cross_entropy=0.5)[0], len(own), counts)
        course = Course("distill", 1, len(own), lambda steps: 48 * steps, 9, 9, 1, 0, marked=True)
        train(
            engine,
            iter(own),
            [],
            course,
            lambda _: 0.1,
            0,
            None,
            kept.append,
            lambda steps: steps,
            Selection("", False, None),
        )
        losses.append(kept[-1]["loss"])
        grown.append(engine.total)
    return sum(losses) / ranks, [sum(parts) / ranks for parts in zip(*grown)]


def test_two_ranks_and_several_batches_equal_one():
    rows = marks(8, share=0.2)
    loss, wanted = step([rows], 1)
    for size, ranks in ((4, 1), (2, 2), (1, 2), (4, 2)):
        other, found = step(list(rows.split(size)), ranks)
        assert abs(other - loss) < 1e-6  # metrics are stored in float32
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, wanted))


def test_held_out_batches_are_weighted_by_what_they_count():
    rows = marks(5)
    values = torch.rand(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = values[positions(rows)].mean()
    for world in (1, 2, 3):
        shares = [share_out(rows, 2, rank, world, marked=True) for rank in range(world)]
        assert len({len(each) for each in shares}) == 1
        total = 0.0
        for batch, weight in sum(shares, []):
            places = [int((rows == row).all(1).nonzero()[0]) for row in batch]
            counted = positions(batch)
            if weight:
                total += weight * float(values[places][counted].mean())
        assert abs(total / world - wanted) < 1e-12
    with pytest.raises(ValueError, match="none of the held-out tokens is an assistant's"):
        share_out(~tokens(4), 2, 0, 1, marked=True)

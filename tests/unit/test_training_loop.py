"""The schedule, the held-out rows and the loop of a training, with an engine that records its calls."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.distill.holdout import hold_out, share_out
from pipeline.distill.loop import Course, train
from pipeline.distill.schedule import learning_rate
from pipeline.distill.selection import Selection


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 7, 24, 200])
def test_the_rate_rises_to_its_peak_and_ends_on_its_floor(kind, steps):
    rates = [learning_rate(kind, step, steps, 3e-4, 0.05, 0.01) for step in range(steps)]
    rising = -(-steps // 20)
    assert max(rates) == pytest.approx(3e-4) == rates[rising - 1]
    assert rates[:rising] == sorted(rates[:rising]) and rates[rising - 1 :] == sorted(rates[rising - 1 :], reverse=True)
    if steps > 1:
        assert rates[-1] == pytest.approx(3e-6)


def test_wsd_is_constant_until_the_last_tenth_and_then_linear():
    rates = [learning_rate("wsd", step, 100, 1.0, 0.0, 0.0) for step in range(100)]
    assert rates[:90] == [1.0] * 90
    assert np.diff(rates[89:]) == pytest.approx(np.full(10, -0.1))
    with pytest.raises(ValueError, match="distill.lr_scheduler.*cosine or wsd"):
        learning_rate("linear", 0, 10, 1.0, 0.0, 0.0)


class Text:
    """A packed text of domains whose row i is all i."""

    def __init__(self, *sizes):
        self.domains = tuple({"name": str(i), "weight": None, "sequences": size} for i, size in enumerate(sizes))
        self.sequence = 4
        self.size = sum(sizes)

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        return np.full(self.sequence, row, dtype=np.int32)


@pytest.mark.parametrize(
    ("sizes", "rows", "held"),
    [((10,), 3, [7, 8, 9]), ((6, 12), 3, [5, 16, 17]), ((1, 1, 9), 1, [10]), ((5, 5, 1), 1, [9]), ((4, 4, 4), 1, [11])],
)
def test_held_out_rows_are_the_tails_and_no_training_row(sizes, rows, held):
    kept, tails = hold_out(Text(*sizes), rows, "distill")
    assert tails[:, 0].tolist() == held
    assert sorted(int(kept[row][0]) for row in range(len(kept))) == sorted(set(range(sum(sizes))) - set(held))
    left = [domain["sequences"] for domain in kept.domains]
    assert sum(left) == len(kept) and min(left) > 0


def test_more_than_half_the_text_is_never_held_out():
    with pytest.raises(ValueError, match="distill.eval_tokens.*6 of the 10"):
        hold_out(Text(10), 6, "distill")
    with pytest.raises(ValueError, match="distill.eval_tokens.*every domain"):
        hold_out(Text(1, 1), 1, "distill")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_weighted_batches_of_all_ranks_make_the_mean_over_rows(world):
    rows = torch.arange(7.0)[:, None].expand(7, 4)
    shares = [share_out(rows, 2, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sum(w * b.mean() for share in shares for b, w in share) / world == pytest.approx(3.0)


LAST = Selection("", False, None)


BEST = Selection("held_out_kl", True, None)


class Recorder:
    """An engine of one number, moved by the mean of what it sees; it records its calls."""

    def __init__(self, losses=()):
        self.weight, self.sum, self.losses, self.saved = 0.0, 0.0, list(losses), []

    def backward(self, batch):
        self.sum += float(batch.double().mean()) + float(torch.rand(()))
        return {"loss": torch.tensor(self.losses.pop(0) if self.losses else self.sum)}

    def step(self, rate):
        self.weight, self.sum = self.weight + rate * self.sum, 0.0
        return abs(self.weight)

    def measure(self, batch):
        return {"kl": batch.double().mean() + self.weight}

    def average(self, values):
        return {name: float(value) for name, value in values.items()}

    def save(self, folder, step, keep, best):
        self.saved.append((step, self.weight))
        self.best = best


def course(**changed):
    values = {"steps": 6, "accumulation": 2, "validate_every": 4, "save_every": 2, "keep": 2, "seed": 3}
    values["tokens"] = lambda steps: 32 * steps
    return Course("distill", **(values | changed))


def run(engine, start=0, tmp="/checkpoints", selection=LAST, **changed):
    kept = []
    batches = (torch.full((2, 8), float(i)) for i in range(2 * start, 100))
    held, rate = [(torch.ones(2, 8), 1.0)], lambda step: 0.1
    engine.selection = train(
        engine, batches, held, course(**changed), rate, start, tmp, kept.append, lambda steps: steps, selection
    )
    return kept


def test_the_loop_measures_saves_and_records_when_it_should():
    engine = Recorder()
    kept = run(engine)
    assert [metrics["step"] for metrics in kept] == list(range(7))
    assert [metrics["step"] for metrics in kept if "held_out_kl" in metrics] == [0, 4, 6]
    assert [step for step, _ in engine.saved] == [2, 4]
    assert kept[3]["tokens"] == 96
    wanted = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert set(kept[3]) == wanted


def test_a_loop_that_goes_on_ends_where_a_straight_one_does_and_measuring_changes_nothing():
    straight = Recorder()
    run(straight)
    measured = Recorder()
    run(measured, validate_every=1)
    assert measured.weight == straight.weight
    resumed = Recorder()
    resumed.weight = dict(straight.saved)[4]
    assert run(resumed, start=4)[0]["step"] == 5
    assert resumed.weight == straight.weight


class Curve(Recorder):
    """An engine whose held-out KL follows a list, measured every step and before the first."""

    def __init__(self, *curve):
        super().__init__()
        self.curve = list(curve)

    def measure(self, batch):
        return {"kl": torch.tensor(self.curve.pop(0), dtype=torch.float64)}


def test_the_best_state_is_saved_when_it_is_measured_and_exported():
    engine = Curve(5.0, 3.0, 4.0, 2.0, 6.0, 7.0, 8.0)
    run(engine, selection=BEST, validate_every=1, save_every=4)
    assert [step for step, _ in engine.saved] == [1, 3, 4] and engine.best == 3
    facts = engine.selection.facts(10)
    assert facts.exported == 2.0 and facts.exported_step == 13 and facts.last == 8.0 and facts.first == 5.0
    assert facts.helped and facts.rose and not facts.stopped_early
    assert any(
        "WARNING" in line and "distill.learning_rate" in line for line in engine.selection.messages("distill", 0)
    )


def test_a_training_that_never_lowers_the_kl_exports_its_beginning_and_says_so():
    engine = Curve(1.0, 1.5, 1.2)
    run(engine, selection=BEST, validate_every=3)
    assert engine.selection.exported == 0 and not engine.selection.facts(0).helped
    assert any("WARNING" in line for line in engine.selection.messages("distill", 0))


def test_the_last_state_is_exported_where_that_is_asked_and_a_worse_one_is_reported():
    engine = Curve(1.0, 1.5, 1.2)
    run(engine, selection=replace(BEST, best=False), validate_every=3, save_every=3)
    assert engine.selection.exported is None and engine.saved[-1][0] == 3 and engine.best is None
    assert engine.selection.facts(0).exported == 1.2 and engine.selection.facts(0).rose


def test_a_training_that_helped_to_its_end_says_nothing():
    engine = Curve(3.0, 2.0, 1.0)
    run(engine, selection=BEST, validate_every=3)
    assert engine.selection.messages("distill", 0) == [] and engine.selection.exported == 6


@pytest.mark.parametrize(("patience", "last"), [(1, 2), (2, 5), (None, 6)])
def test_patience_counts_measurements_without_a_lower_value(patience, last):
    engine = Curve(5.0, 4.0, 4.5, 3.0, 3.0, 3.1, 1.0)
    kept = run(engine, selection=replace(BEST, patience=patience), validate_every=1)
    assert kept[-1]["step"] == last and engine.selection.last_step == last
    assert engine.selection.facts(0).stopped_early == (patience is not None)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_place_of_the_last_checkpoint(fault):
    engine = Recorder([1.0] * 6 + [fault])
    with pytest.raises(FloatingPointError, match=r"distill: loss (nan|inf).*step 4.*step 2 is in /checkpoints"):
        run(engine)
    assert [step for step, _ in engine.saved] == [2]


def test_a_gradient_that_is_not_finite_stops_too():
    engine = Recorder()
    engine.step = lambda rate: float("inf")
    with pytest.raises(FloatingPointError, match="gradient norm inf at step 1.*no checkpoint.*distill.max_grad_norm"):
        run(engine)


def test_batches_that_do_not_divide_and_runs_below_a_step_are_refused():
    from pipeline.training_settings import accumulation, steps_of

    def training(**changed):
        plain = {"global_batch_size": 8, "micro_batch_size": 4, "tokens": 49152, "max_steps": None}
        return SimpleNamespace(**(plain | changed))

    assert accumulation("distill", training(), 2) == 1
    with pytest.raises(ValueError, match=r"distill.global_batch_size.*10.*micro_batch_size.*nearest: 8 or 12"):
        accumulation("distill", training(global_batch_size=10), 1)
    with pytest.raises(ValueError, match=r"= 12; nearest: 12"):
        accumulation("distill", training(), 3)
    with pytest.raises(ValueError, match="regularize.tokens.*4095"):
        steps_of("regularize", training(tokens=4095), 512)
    assert steps_of("distill", training(tokens=9000), 512) == 2
    assert steps_of("distill", training(tokens=90000, max_steps=3), 512) == 3

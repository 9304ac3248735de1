"""One module learns what a larger one gives: what the student must not lose, and what it gains."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier

import pytest
import torch
from torch import nn

from pipeline.distill.local import Learnt, Lessons, Rows, learn

LESSONS = Lessons(4, 64, 0.02, 0)


class Gated(nn.Module):
    """silu(x G) * (x U) D, with a bias on the way out."""

    def __init__(self, width: int, neurons: int, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.gate, self.up = (nn.Linear(width, neurons, bias=False) for _ in range(2))
        self.down = nn.Linear(neurons, width)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def rows(read: torch.Tensor, wanted: torch.Tensor) -> Rows:
    return Rows(read, read, wanted, torch.arange(len(read)), len(read))


def taught(tokens: int = 512, seed: int = 1) -> tuple[Gated, Rows]:
    """Return the module that keeps 16 of 24 neurons, and the stream before and behind the whole one."""
    whole, part = Gated(12, 24), Gated(12, 16)
    for kind in ("gate", "up"):
        getattr(part, kind).weight.data.copy_(getattr(whole, kind).weight[:16])
    part.down.weight.data.copy_(whole.down.weight[:, :16])
    part.down.bias.data.copy_(whole.down.bias)
    inputs = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return part, rows(inputs, inputs + whole(inputs))


def alone(tensors):
    """Add over one rank."""


@torch.no_grad()
def error(module: nn.Module, read: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((read + module(read) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def test_what_it_learns_holds_on_tokens_that_no_step_saw():
    part, known = taught()
    _, fresh = taught(256, 2)
    start = error(part, fresh.read, fresh.wanted)
    result = learn(part, known, Lessons(20, 32, 0.02, 0), alone)
    assert result.after < result.before
    assert error(part, fresh.read, fresh.wanted) < 0.9 * start


def test_the_errors_told_are_those_of_every_sixteenth_token():
    part, known = taught()
    before = error(part, known.read[15::16], known.wanted[15::16])
    result = learn(part, known, LESSONS, alone)
    assert result.before == pytest.approx(before, rel=1e-5)
    assert result.after == pytest.approx(error(part, known.read[15::16], known.wanted[15::16]), rel=1e-5)


def test_held_out_tokens_teach_nothing():
    """In another order among themselves they would be trained on at other steps."""
    one, known = taught()
    two, read, wanted = deepcopy(one), known.read.clone(), known.wanted.clone()
    for each in (read, wanted):
        each[15::16] = each[15::16].roll(1, 0)
    learn(one, known, LESSONS, alone)
    learn(two, rows(read, wanted), LESSONS, alone)
    assert all(torch.equal(each, other) for each, other in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("rate", [10.0, 1e30])
def test_weights_that_got_worse_are_put_back(rate):
    """A rate far too high, and one that ends in no number."""
    part, known = taught()
    before = deepcopy(part.state_dict())
    result = learn(part, known, Lessons(1, 64, rate, 0), alone)
    assert result.after == result.before
    for name, weight in part.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_vectors_stay_and_one_seed_gives_one_result():
    part, known = taught()
    other, bias = deepcopy(part), part.down.bias.detach().clone()
    learn(part, known, LESSONS, alone)
    learn(other, known, LESSONS, alone)
    assert torch.equal(part.down.bias, bias) and not torch.equal(part.down.weight, taught()[0].down.weight)
    assert all(torch.equal(one, two) for one, two in zip(part.parameters(), other.parameters(), strict=True))


def test_a_rate_suits_weights_of_any_size():
    """A matrix eight times as large, and one as much smaller behind it, learn the same, in their own measure."""
    part, known = taught()
    other = deepcopy(part)
    other.up.weight.data.mul_(8)
    other.down.weight.data.div_(8)
    one, two = learn(part, known, LESSONS, alone), learn(other, known, LESSONS, alone)
    assert two.before == pytest.approx(one.before, rel=1e-5) and two.after == pytest.approx(one.after, rel=1e-4)
    torch.testing.assert_close(other.up.weight, 8 * part.up.weight, rtol=1e-3, atol=1e-3)


def test_a_token_with_a_long_stream_counts_as_much_as_any():
    """What it adds to the gradient is the same for a stream twice as long that is as far off, relatively."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return x @ self.weight

    read = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    lengths = torch.ones(32, 1)
    lengths[::4] = 64.0
    one, two = Shift(), Shift()
    plain = learn(one, rows(read, 3 * read), LESSONS, alone)
    long = learn(two, rows(read * lengths, 3 * read * lengths), LESSONS, alone)
    assert long.before == pytest.approx(plain.before) and long.after == pytest.approx(plain.after, rel=1e-4)
    torch.testing.assert_close(one.weight, two.weight)


@pytest.mark.parametrize("first", [slice(0, None, 2), slice(None)])
def test_two_ranks_learn_what_one_learns(first):
    """Each has every other token, or the second has none; what they add is added, in turn, as between processes."""
    part, known = taught()
    taken = torch.arange(512)[first]
    shares = taken, torch.arange(512)[~torch.isin(torch.arange(512), taken)]
    learners, barrier, given = [deepcopy(part) for _ in range(2)], Barrier(2), {}

    def work(rank: int) -> Learnt:
        def add(tensors):
            given[rank] = [each.clone() for each in tensors]
            barrier.wait()
            for tensor, one, two in zip(tensors, given[0], given[1], strict=True):
                tensor.copy_(one + two)
            barrier.wait()

        own = shares[rank]
        return learn(learners[rank], Rows(known.read[own], known.base[own], known.wanted[own], own, 512), LESSONS, add)

    with ThreadPoolExecutor(2) as ranks:
        result = list(ranks.map(work, range(2)))
    whole = learn(part, known, LESSONS, alone)
    assert result[0] == result[1]
    assert result[0].before == pytest.approx(whole.before) and result[0].after == pytest.approx(whole.after, rel=1e-4)
    for one, two, each in zip(*(learner.parameters() for learner in (*learners, part)), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, each, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_it_adds_to_need_not_be_what_it_reads_and_biases_of_experts_stay():
    """As where attention and FFN read the same stream, and where a class holds the biases of all experts in one."""
    part, known = taught()
    draw = torch.Generator().manual_seed(7)
    base = torch.randn(known.read.shape, generator=draw)
    part.up.register_parameter("experts_bias", nn.Parameter(torch.ones(1, 16)))
    part.up.register_forward_hook(lambda up, _, output: output + up.experts_bias)
    apart = Rows(known.read, base, base + known.wanted - known.read, known.places, known.total)
    result = learn(part, apart, LESSONS, alone)
    assert result.after < 0.9 * result.before and torch.equal(part.up.experts_bias, torch.ones(1, 16))
    assert all(weight.grad is None for weight in part.parameters())

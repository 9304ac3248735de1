"""The stream is one endless sequence of rows: the same for any number of ranks, from any position, for a seed."""

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.data.encoding import Frame
from pipeline.data.packing import Domain, Packed, build
from pipeline.data.sources import Piece
from pipeline.data.stream import stream

SEQUENCE = 4


def letters(texts, **_):
    """A tokenizer of one token a character."""
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def packed(folder, *sizes, weights=None):
    """A packed folder whose row i of all is filled with i + 32, in domains of the given numbers of rows."""
    rows = iter(range(32, 32 + sum(sizes)))
    domains = []
    for number, size in enumerate(sizes):
        text = "".join(chr(next(rows)) * SEQUENCE for _ in range(size))
        domains.append(Domain(str(number), [Piece(text, False), Piece("", True)], weights and weights[number]))
    build(folder, domains, letters, Frame(0, None, "\0"), SEQUENCE, 1 << 16, 5 * 4 * SEQUENCE, lambda items, *_: items)
    return Packed(folder)


def positions(source, count, start=0, seed=7, batch=1, rank=0, world=1):
    """The numbers of the rows that `count` batches of a rank hold."""
    batches = islice(stream(source, batch, rank, world, start, seed), count)
    return torch.cat([rows[:, 0] for rows in batches]).sub(32).tolist()


@pytest.fixture(params=[None, (1.0, 2.5, 0.5)], ids=["by size", "weighted"])
def source(request, tmp_path):
    return packed(tmp_path / "packed", 11, 5, 7, weights=request.param)


def test_batches_are_int64_rows_of_the_packed_tokens(source):
    batch = next(stream(source, 3, 0, 1, 0, 0))
    assert batch.dtype == torch.int64 and batch.shape == (3, SEQUENCE)
    assert all((source[int(row[0]) - 32] == row.numpy()).all() for row in batch)


def test_every_epoch_has_every_row_once_in_a_new_order(tmp_path):
    order = np.array(positions(packed(tmp_path / "packed", 11, 5, 7), 5 * 23)).reshape(5, 23)
    assert (np.sort(order, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in order}) == 5
    domains = np.searchsorted([11, 16], order, side="right")
    assert len({tuple(epoch) for epoch in domains}) == 5, "domains must mix, differently in every epoch"
    assert all(len(set(epoch[:11])) > 1 for epoch in domains)


def test_the_seed_alone_decides_the_order(source):
    assert positions(source, 60) == positions(source, 60)
    assert positions(source, 60) != positions(source, 60, seed=8)


def test_a_stream_from_a_position_is_the_tail_of_the_stream_from_the_start(source):
    whole = positions(source, 120)
    for start in (0, 1, 22, 23, 24, 46, 77, 100):
        assert positions(source, 120 - start, start) == whole[start:]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_the_batches_of_several_ranks_united_are_those_of_one(source, world, start):
    one = np.array(positions(source, 20, start, batch=2 * world)).reshape(20, 2, world)
    for rank in range(world):
        assert positions(source, 20, start, batch=2, rank=rank, world=world) == one[:, :, rank].ravel().tolist()


def test_ranks_that_resume_together_go_on_where_they_stopped(source):
    straight = positions(source, 30, batch=2, rank=1, world=3)
    assert positions(source, 18, start=12 * 6, batch=2, rank=1, world=3) == straight[12 * 2 :]


def test_the_batch_size_does_not_change_the_order(source):
    assert positions(source, 60) == positions(source, 15, batch=4)


def test_weights_are_the_shares_of_the_rows_drawn(tmp_path):
    source = packed(tmp_path / "packed", 40, 10, 50, weights=(1.0, 2.0, 1.0))
    drawn = np.array(positions(source, 400))
    for epoch in drawn.reshape(4, 100):
        assert [((low <= epoch) & (epoch < high)).sum() for low, high in ((0, 40), (40, 50), (50, 100))] == [25, 50, 25]
    counts = np.bincount(drawn, minlength=100)
    assert set(counts[40:50]) == {20}, "a small domain repeats all its rows alike"
    assert set(counts[:40]) <= {2, 3} and set(counts[50:]) == {2}, "a large one shows each row before any again"


@pytest.mark.parametrize("factor", [5e-324, 1e-300, 8e307])
def test_weights_of_any_size_are_shares(tmp_path, factor):
    source = packed(tmp_path / "packed", 4, 8, weights=(factor, 2 * factor))
    drawn = np.array(positions(source, 24))
    assert ((drawn < 4).sum(), (drawn >= 4).sum()) == (8, 16)


def test_a_domain_of_hardly_any_weight_is_still_drawn(tmp_path):
    assert 9 in positions(packed(tmp_path / "packed", 9, 1, weights=(1.0, 1e-6)), 11)


@pytest.mark.parametrize("batch, rank, world, start", [(0, 0, 1, 0), (1, 1, 1, 0), (1, -1, 2, 0), (1, 0, 1, -1)])
def test_an_impossible_stream_is_refused_at_once(source, batch, rank, world, start):
    with pytest.raises(ValueError, match="is impossible; needs batch >= 1"):
        stream(source, batch, rank, world, start, 0)

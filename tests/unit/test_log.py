"""Progress and messages: rank 0 prints, the others are silent, and the items pass through unchanged."""

import time
from itertools import count

import pytest
from tqdm import tqdm

from pipeline.runtime import log


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("total", [3, None])
def test_the_items_pass_through_in_order(rank, total):
    assert list(log.progress(iter("abc"), total, "score", rank)) == ["a", "b", "c"]


def test_only_the_first_rank_prints(capsys):
    for rank in (0, 1):
        log.say(f"from rank {rank}", rank)
    assert capsys.readouterr().out == "from rank 0\n"


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    assert list(log.progress(range(5), 5, "score", 0)) == list(range(5))
    assert capsys.readouterr().err == ""  # done within the time of one line
    seconds = count(step=log.EVERY / 2)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))  # two items take as long as a line
    list(log.progress(range(6), 6, "score", 0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["score: 2/6 (33%)", "score: 4/6 (67%)"]
    assert all(line.endswith(" left") for line in lines)
    list(log.progress(range(3), 3, "score", 1))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("done, seconds, left", [(1, 60.0, "3:00"), (2, 7200.0, "2:00:00"), (3, 3.0, "0:01")])
def test_the_time_left_is_that_of_the_items_left(done, seconds, left):
    assert log._line("score", done, 4, seconds).endswith(f", {left} left")


def test_bars_of_libraries_are_silent_in_logs_and_come_back(capsys):
    with log.bars_on_terminals_only():
        assert list(tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(tqdm(range(3))) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err

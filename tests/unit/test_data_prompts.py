"""Prompts are what precedes an assistant's turn, or the beginning of a document, and never longer than requested."""

import numpy as np
import pytest

from pipeline.data.prompts import Prompts

END, FIRST = 1, 2


def chat(*turns, length=24):
    """Return a row of marked tokens: ids 10, 11, ... of which those in `turns` are an assistant's."""
    ids = np.arange(10, 10 + length, dtype=np.int32)
    counted = np.zeros(length, dtype=bool)
    for start, stop in turns:
        counted[start:stop] = True
    return np.where(counted, ids, ~ids)


def drawn(prompts, row, count=30):
    """Return the prompts that several draws give, as tuples."""
    return {tuple(prompts.of(row, np.random.default_rng([0, place])).tolist()) for place in range(count)}


def test_a_prompt_is_what_precedes_a_turn_of_the_assistant():
    """It is drawn among the turns with enough before them, else the last; a turn that opens the row has no prompt."""
    found = drawn(Prompts(6, END, None), chat((0, 2), (4, 7), (12, 15), (20, 24)))
    assert found == {tuple(range(16, 22)), tuple(range(24, 30))}
    assert drawn(Prompts(16, END, None), chat((4, 7), (12, 15))) == {tuple(range(10, 22))}
    assert drawn(Prompts(12, END, None), chat((4, 7), (12, 15))) == {tuple(range(10, 22))}


def test_text_without_turns_gives_the_beginnings_of_documents():
    row = np.arange(10, 34, dtype=np.int32)
    assert drawn(Prompts(5, END, None), row) == {(10, 11, 12, 13, 14)}
    row[[7, 15, 21]] = END
    assert drawn(Prompts(5, END, None), row) == {(18, 19, 20, 21, 22), (26, 27, 28, 29, 30)}
    assert drawn(Prompts(24, END, None), row) == {tuple(row.tolist())}
    answer = chat((0, 24))
    assert drawn(Prompts(5, END, None), answer) == {(10, 11, 12, 13, 14)}, "a row within one answer"


def test_a_prompt_opens_as_rows_do():
    prompts = Prompts(5, END, FIRST)
    row = np.arange(10, 34, dtype=np.int32)
    row[0] = FIRST
    assert drawn(prompts, row) == {(FIRST, 11, 12, 13, 14)}
    row[9] = END
    assert drawn(prompts, row) == {(FIRST, 20, 21, 22, 23)}
    marked = chat((12, 15))
    marked[0] = ~FIRST
    assert drawn(prompts, marked) == {(FIRST, 18, 19, 20, 21)}
    assert drawn(Prompts(12, END, FIRST), marked) == {(FIRST, *range(11, 22))}


@pytest.mark.parametrize("tokens", [1, 3, 24])
def test_a_prompt_has_a_token_and_no_more_than_requested(tokens):
    rows = [chat((1, 4)), chat((23, 24)), np.full(24, END, dtype=np.int32), np.arange(24, dtype=np.int32) + 3]
    for first in (None, FIRST):
        for row in rows:
            assert all(1 <= len(each) <= tokens for each in drawn(Prompts(tokens, END, first), row))

"""The metrics of a training that was interrupted: rows that were changed on disk choose no state."""

import json

import pytest

from pipeline import training
from tests.students import machine

ROWS = [{"step": step, "tokens": 8 * step, "held_out_kl": 1.0 / (step + 1)} for step in range(4)]


@pytest.fixture
def out(tmp_path):
    (tmp_path / training.CHECKPOINTS).mkdir()
    for row in ROWS:
        training._record(tmp_path, "distill", 3, machine(), row)
    return tmp_path


def test_rows_are_those_that_were_recorded(out):
    assert training._rows(out, 0) == ROWS and training._rows(out, 1) == ROWS[1:]
    assert [json.loads(line) for line in (out / training.METRICS).read_text().splitlines()] == ROWS


@pytest.mark.parametrize("place", [training.METRICS, f"{training.CHECKPOINTS}/{training.SUMS}"])
def test_rows_end_before_the_first_that_was_changed_or_cut_off(out, place):
    path = out / place
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    second = bytearray(lines[2])
    second[-3] ^= 1
    path.write_bytes(b"".join([*lines[:2], bytes(second), lines[3]]))
    assert training._rows(out, 0) == ROWS[:2]
    path.write_bytes(whole[:-1])
    assert training._rows(out, 0) == ROWS[:3]
    path.unlink()
    assert training._rows(out, 0) == []

"""Malformed inputs of every kind: each is refused in one line, or read and verified.

A few cases of each kind, the same every time; the long form is benchmarks/faults/fuzz.py.
"""

import pytest

from tests.fuzz import run
from tests.fuzz.targets import TARGETS

CASES = 40
FOUND = {  # cases that a longer run found
    "lines": [
        ("part-00000", b'{"text": "a"}\n{"text": 1}', "text"),
        ("a.jsonl", b'{"\\n": ""}', "text"),
    ],
    "prose": [("a", b"\xef", "text"), ("a.txt", b"\xef\xbb", "text")],
    "tokenizer": [
        {
            "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", '
            b'"model_max_length": {}}'
        },
    ],
}


@pytest.mark.parametrize("name", TARGETS)
def test_drawn_cases_are_refused_in_one_line_or_read_and_verified(name, tmp_path):
    found = run(TARGETS[name](tmp_path), CASES, seed=1)
    assert not found.faults, "\n".join(f"{place}\n{case}" for place, case in found.faults.items())
    assert found.counts.total() >= CASES // 2


@pytest.mark.parametrize("name", FOUND)
def test_cases_that_were_found_stay_refused(name, tmp_path):
    target = TARGETS[name](tmp_path)
    for case in FOUND[name]:
        with pytest.raises(ValueError):
            target.read(case)

"""Kills and disk faults at any operation on files end in a kill or one line; running again gives the same student."""

import random

import pytest

from tests.injection import available, driver, leftovers, made_of, student_of, walk
from tests.world import make_world, settings

pytestmark = [pytest.mark.skipif(not available(), reason="no C compiler"), pytest.mark.slow]
SMALL = {
    "data__sequence_length": 16,
    "score__tokens": 128,
    "distill__tokens": 512,
    "distill__save_steps": 1,
    "evaluate__tokens": 128,
    "evaluate__words": 0,
    "evaluate__speed": "false",
    "report__samples": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Yield a folder, a driver, the settings of a run by its name, and how many operations the reference run took."""
    folder = make_world(tmp_path_factory.mktemp("world"))

    def chosen(name):
        return [*settings(folder, runs=folder / name / "runs", artifacts=folder / name / "artifacts", **SMALL), "run=x"]

    with driver(folder / "driver") as process:
        outcome = process.run(chosen("reference"), folder / "reference")
        assert outcome.status == 0, outcome.output[-3000:]
        yield folder, process, chosen, outcome.operations


@pytest.mark.parametrize("kinds", [("kill", "after"), ("enospc", "eio")], ids=["killed", "disk"])
def test_a_run_that_was_stopped_anywhere_gives_the_same_student_byte_for_byte(world, kinds):
    folder, process, chosen, operations = world
    place = folder / "-".join(kinds)
    struck = walk(process, chosen(place.name), place, kinds, operations // 10, random.Random(7))
    assert len(struck) > 4
    wanted = folder / "reference"
    assert student_of(place / "runs/x/student") == student_of(wanted / "runs/x/student")
    assert made_of(place / "artifacts") == made_of(wanted / "artifacts")
    assert leftovers(place / "artifacts") == []
    assert sorted(path.name for path in (place / "runs/x").iterdir()) == sorted(
        path.name for path in (wanted / "runs/x").iterdir()
    )


def test_a_short_write_is_completed(world):
    folder, process, chosen, operations = world
    draw = random.Random(3)
    outcome = process.run(chosen("short"), folder / "short", "short", draw.randint(1, operations))
    assert outcome.status == 0, outcome.output[-3000:]
    assert student_of(folder / "short/runs/x/student") == student_of(folder / "reference/runs/x/student")

"""A rank that dies in a stage ends the run in bounded time with one line; running again gives the same artifacts.

All stages of every recipe, and many deaths a stage: benchmarks/faults/rank_death.py.
"""

import random

import pytest

from tests.injection import leftovers, made_of, student_of
from tests.injection.rank_death import rank_driver, walk
from tests.world import make_world, settings

STAGES = ("tokens/1", "importance/1", "cut/1", "local_distill/1", "distill/1", "evaluate/1")  # rank 0 alone runs cut
TIMEOUT = 4.0  # seconds without a heartbeat after which a rank counts as dead
SMALL = {
    "recipe": "pangu_light",
    "stages": "[importance,shape,plan,cut,local_distill,distill,export,evaluate]",
    "data__sequence_length": 16,
    "score__tokens": 128,
    "local_distill__tokens": 256,
    "local_distill__batch_tokens": 64,
    "local_distill__epochs": 1,
    "distill__tokens": 256,
    "distill__save_steps": 1,
    "distill__eval_steps": 100,
    "evaluate__tokens": 128,
    "evaluate__words": 0,
    "evaluate__speed": "false",
    "device__timeout": TIMEOUT,
}


@pytest.mark.slow
def test_a_rank_killed_in_a_stage_ends_the_run_and_the_same_command_resumes(tmp_path):
    world = make_world(tmp_path)

    def chosen(name):
        return [*settings(world, runs=world / name / "runs", artifacts=world / name / "artifacts", **SMALL), "run=x"]

    with rank_driver(world / "driver") as driver:
        straight = driver.run(chosen("straight"))
        assert straight.status == [0, 0], straight.outputs
        deaths = list(walk(driver, chosen("killed"), straight.calls, 4 * TIMEOUT, random.Random(5), STAGES))
    assert tuple(death.stage for death in deaths) == STAGES and {death.rank for death in deaths} == {0, 1}
    assert student_of(world / "killed/runs/x/student") == student_of(world / "straight/runs/x/student")
    assert made_of(world / "killed/artifacts") == made_of(world / "straight/artifacts")
    assert leftovers(world / "killed/artifacts") == []

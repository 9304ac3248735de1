"""What the stage distill exports and reports: the best held-out state, and that recovery did not help."""

import json

import pytest
import torch

from pipeline.runtime.checkpoint import open_checkpoint
from tests.world import make_world, pipeline, settings

STAGES = "stages=[importance,shape,plan,cut,distill]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("selection"))


def recovered(world, run, **changed):
    """Run to the recovery with a learning rate that ruins the student; return folders by stage, facts and output."""
    ruin = {"distill__learning_rate": 10.0, "distill__eval_steps": 2, "distill__max_grad_norm": 1e9}
    done = pipeline(f"run={run}", STAGES, *settings(world, **(ruin | changed)), cwd=world)
    record = json.loads((world / "runs" / run / "run.json").read_text())
    folders = {name: world / "artifacts" / stage["artifact"] for name, stage in record["stages"].items()}
    return folders, json.loads((folders["distill"] / "recovery.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_recovery_that_ruins_the_student_exports_what_it_began_with_and_warns(world):
    folders, facts, output = recovered(world, "best")
    cut, student = open_checkpoint(folders["cut"]), open_checkpoint(folders["distill"])
    assert all(torch.equal(cut[name].float(), student[name]) for name in cut)
    assert facts["rose"] and not facts["helped"] and facts["exported_step"] == 0
    assert facts["exported"] == facts["first"] < facts["last"]
    assert "WARNING" in output and "distill.learning_rate" in output


@pytest.mark.slow
def test_the_last_state_is_exported_on_request_and_patience_ends_the_training(world):
    folders, facts, output = recovered(world, "last", distill__select="last", distill__patience=1)
    cut, student = open_checkpoint(folders["cut"]), open_checkpoint(folders["distill"])
    assert not any(torch.equal(cut[name].float(), student[name]) for name in cut)
    assert facts["stopped_early"] and facts["exported_step"] == facts["last_step"] == 2
    assert facts["exported"] == facts["last"] and "WARNING" in output and "distill.patience" in output
    rows = [json.loads(line) for line in (folders["distill"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]

"""The stage that folds a linear map in place of removed layers, by the real command and in this process."""

import pytest
import torch

from pipeline import runner
from pipeline.runtime.checkpoint import open_checkpoint, open_tensors
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings

PARTS = "stages=[importance,shape,plan,bypass,cut]"
BYPASS = ("reinit.bypass=true", "plan.clap=false", "plan.depth=last", "reinit.bypass_tokens=512")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("bypass"))


def made(world, *overrides, **values):
    return runner.run(configured(*settings(world, **values), "run=unit", PARTS, *overrides), "a test")


def test_only_the_w_down_before_removed_layers_changes_and_the_class_stays(world):
    plain, changed = (
        open_checkpoint(made(world, *BYPASS, f"reinit.bypass={bypassed}", shape__neurons=None)["initial_student"])
        for bypassed in ("false", "true")
    )
    assert {name for name in plain if not torch.equal(plain[name], changed[name])} == {
        "model.layers.2.mlp.down_proj.weight"
    }
    assert plain.config["architectures"] == changed.config["architectures"]


def test_two_ranks_fit_what_one_fits_and_nothing_is_fitted_where_no_layer_is_removed(world):
    one = open_tensors(made(world, *BYPASS)["bypassed"])
    chosen = settings(world, artifacts=world / "two")
    pipeline("run=two", *chosen, *BYPASS, PARTS, cwd=world, ranks=2)
    (folder,) = (world / "two").glob("bypass-*")
    two = open_tensors(folder)
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(one[name].float(), two[name].float(), rtol=1e-4, atol=1e-5)
    assert not list(open_tensors(made(world, *BYPASS, shape__layers=4)["bypassed"]))

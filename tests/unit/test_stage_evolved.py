"""plan.depth=evolved through the stages on a tiny model: never worse than its start, the same again for a seed."""

import itertools
import json

import pytest
import torch

from pipeline import line
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.evaluation.perplexity import tally
from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import Scores
from pipeline.prune.plan import kept_layers
from pipeline.runtime.checkpoint import load_model
from pipeline.stages import depth
from tests.tiny_text import configured
from tests.world import make_world, settings

CHOSEN = ["plan.depth=evolved", "plan.depth_tokens=256", "depth.generations=3", "depth.offspring=3"]
CUT = "stages=[score,shape,depth,plan,cut]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("evolved"), num_hidden_layers=6)


def made(world, *overrides, **values):
    given = {"run": "unit", "shape__neurons": 24} | values
    return line.run(configured(*settings(world, **given), *CHOSEN, "plan.clap=false", CUT, *overrides), "a test")


def found(folders):
    told = json.loads((folders["depth"] / "depth.json").read_text())
    return told, {tuple(each["kept"]): each["loss"] for each in told["tried"]}


@pytest.mark.parametrize("start", ["influence", "loss"])
def test_an_evolved_choice_is_never_worse_than_its_start_and_is_the_one_that_is_cut(world, start):
    folders = made(world, f"depth.start={start}")
    told, tried = found(folders)
    if start == "influence":
        scores = Scores.load(folders["scores"] / "scores.safetensors")
        begun = tuple(kept_layers(scores.layers, 3, "influence", 1))
        assert next(iter(tried)) == begun
    else:
        begun = tuple(found(made(world, "plan.depth=loss"))[0]["kept"])
    assert told["loss"] <= tried[begun]
    assert told["loss"] == min(loss for kept, loss in tried.items() if len(kept) == 3) == tried[tuple(told["kept"])]
    assert len(tried) == len(told["tried"]), "no set is measured twice"
    blueprint = Blueprint.load(folders["blueprint"] / "blueprint.json")
    assert [plan.host for plan in blueprint.layers] == told["kept"] and told["kept"][0] == 0
    batches = beginning(Packed(folders["tokens"] / "calibration"), 256, 8, 0, 1, 0)
    sums = tally(load_model(folders["start"], torch.float32, "eager"), batches, 64)
    assert float(sums[0] / sums[2]) == pytest.approx(told["loss"], rel=2e-2)


def test_enough_generations_find_the_best_of_all_sets(world):
    told, tried = found(made(world, "depth.generations=30"))
    assert set(tried) == {(0, *rest) for rest in itertools.combinations(range(1, 6), 2)}
    assert told["loss"] == min(tried.values())


def test_a_seed_finds_the_same_again(world):
    first, again = (made(world, f"artifacts={world / place}", "seed=7") for place in ("one", "two"))
    assert first["depth"] != again["depth"] and found(first) == found(again)


def test_the_digest_of_the_greedy_choice_knows_nothing_of_evolution():
    plain = configured("plan.depth=loss")
    assert depth.settings(plain) == depth.settings(configured("plan.depth=loss", "depth.generations=99"))
    assert set(depth.settings(plain)) == {"tokens", "keep_first", "batch", "seed"} and depth.needs(plain) == ()
    evolved = depth.settings(configured("plan.depth=evolved"))
    assert evolved["evolved"] == {"start": "influence", "generations": 20, "offspring": 8}
    with pytest.raises(ValueError, match="depth.offspring"):
        configured("depth.offspring=0")

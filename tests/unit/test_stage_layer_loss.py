"""plan.depth=evolved through the stages on a tiny model: never worse than its start, the same again for a seed."""

import itertools
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pipeline import runner
from pipeline.data.packing import Packed
from pipeline.data.stream import beginning
from pipeline.evaluation.perplexity import tally
from pipeline.model.blueprint import Blueprint
from pipeline.model.scores import Scores
from pipeline.model.shape import Depth
from pipeline.prune.passes.prefix import PrefixCache
from pipeline.prune.plan import kept_layers
from pipeline.runtime.device import open_device
from pipeline.runtime.machine import Machine
from pipeline.runtime.model_loader import load_model
from pipeline.runtime.tracker import Track
from pipeline.stages.analyse import layer_loss
from tests.processes import on_ranks
from tests.tiny_text import configured
from tests.watching import calls_of, counted, watched
from tests.world import make_world, settings

CHOSEN = ["plan.depth=evolved", "plan.depth_tokens=256", "layer_loss.generations=3", "layer_loss.offspring=3"]
CUT = "stages=[importance,shape,layer_loss,plan,cut]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("evolved"), num_hidden_layers=6)


def made(world, *overrides, **values):
    given = {"run": "unit", "shape__neurons": 24} | values
    return runner.run(configured(*settings(world, **given), *CHOSEN, "plan.clap=false", CUT, *overrides), "a test")


def found(folders):
    depth = Depth.load(folders["depth"])
    return depth, {each.kept: each.loss for each in depth.tried}


@pytest.mark.parametrize("start", ["influence", "loss"])
def test_an_evolved_choice_is_never_worse_than_its_start_and_is_the_one_that_is_cut(world, start):
    folders = made(world, f"layer_loss.start={start}")
    depth, tried = found(folders)
    if start == "influence":
        scores = Scores.load(folders["scores"])
        begun = tuple(kept_layers(scores.layers, 3, "influence", {0}))
        assert next(iter(tried)) == begun
    else:
        begun = tuple(found(made(world, "plan.depth=loss"))[0].kept)
    assert depth.loss <= tried[begun]
    assert depth.loss == min(loss for kept, loss in tried.items() if len(kept) == 3) == tried[depth.kept]
    assert len(tried) == len(depth.tried), "no set is measured twice"
    blueprint = Blueprint.load(folders["blueprint"])
    assert tuple(plan.host for plan in blueprint.layers) == depth.kept and depth.kept[0] == 0
    batches = beginning(Packed(folders["tokens"] / "calibration"), 256, 8, 0, 1, 0)
    sums = tally(load_model(folders["initial_student"], torch.float32, "eager"), batches, 64)
    assert float(sums[0] / sums[2]) == pytest.approx(depth.loss, rel=2e-2)


def test_enough_generations_find_the_best_of_all_sets(world):
    depth, tried = found(made(world, "layer_loss.generations=30"))
    assert set(tried) == {(0, *rest) for rest in itertools.combinations(range(1, 6), 2)}
    assert depth.loss == min(tried.values())


def test_a_seed_finds_the_same_again(world):
    first, again = (made(world, f"artifacts={world / place}", "seed=7") for place in ("one", "two"))
    assert first["depth"] != again["depth"] and found(first) == found(again)


def chosen(ranks, place, interrupted_at, *inputs):
    """Run the stage into a folder, to its end or until it begins to measure a set; return how many it began."""
    given = dict(zip(("subject", "tokens", "shape"), map(Path, inputs), strict=True))
    Path(place).mkdir(exist_ok=True)
    machine = Machine(open_device("cpu", "auto", False, ranks.local_rank, 0), ranks, Track())
    config = configured(*CHOSEN, "layer_loss.start=loss", f"calibration.batch_size={8 // ranks.world}")
    interrupted = suppress(KeyboardInterrupt)
    with interrupted, calls_of(tally, KeyboardInterrupt(), interrupted_at) as measured:
        layer_loss.run(config, given, Path(place), machine)
    return len(measured)


def chosen_twice(ranks, place, *inputs):
    """Return how many sets a straight run measures, and one interrupted inside its evolution, in two attempts."""
    straight = chosen(ranks, f"{place}/straight", 0, *inputs)
    first = chosen(ranks, f"{place}/killed", straight - 1, *inputs)
    assert not (Path(place) / "killed" / "depth.json").exists()
    return straight, first, chosen(ranks, f"{place}/killed", 0, *inputs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupted_choice_measures_no_set_twice_and_ends_the_same(world, tmp_path, world_size):
    folders = made(world, "stages=[importance,shape]")
    inputs = tuple(str(folders[name].absolute()) for name in ("teacher", "tokens", "shape"))
    result = on_ranks(chosen_twice, tmp_path, world_size, arguments=(str(tmp_path), *inputs))
    straight = result[0][0]
    assert result == [[straight, straight - 1, 2]] * world_size and straight > 5 + 4 + 3
    killed, straight = (tmp_path / name for name in ("killed", "straight"))
    assert Depth.load(killed) == Depth.load(straight)
    assert [path.name for path in killed.iterdir()] == [Depth.FILE]


def test_a_greedy_choice_runs_no_layer_again_that_two_sets_begin_with(world):
    """Five sets of five layers, without layer 1, 2, 3, 4, 5: each is reached along what it shares with the last."""
    counts = Counter()
    with watched({PrefixCache.__init__: lambda given: counted(given["model"], counts)}):
        made(world, "plan.depth=loss", f"artifacts={world / 'counted'}", "calibration.batch_size=100", shape__layers=5)
    assert counts == {0: 2, 1: 2, 2: 3, 3: 4, 4: 4, 5: 4}


def test_the_digest_of_the_greedy_choice_knows_nothing_of_evolution():
    plain = configured("plan.depth=loss")
    assert layer_loss.settings(plain) == layer_loss.settings(configured("plan.depth=loss", "layer_loss.generations=99"))
    assert set(layer_loss.settings(plain)) == {"tokens", "keep_first", "seed"} and layer_loss.needs_also(plain) == ()
    evolved = layer_loss.settings(configured("plan.depth=evolved"))
    assert evolved["evolved"] == {"start": "influence", "generations": 20, "offspring": 8}
    with pytest.raises(ValueError, match="layer_loss.offspring"):
        configured("layer_loss.offspring=0")

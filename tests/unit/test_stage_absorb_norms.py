"""The ways to put scales in the place of post-norms, through the stage; and what is refused before any work."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from pipeline import runner
from pipeline.data.packing import Packed
from pipeline.data.stream import stream
from pipeline.model.causal import decoder_of
from pipeline.prune.surgery.absorption import fitted_scales
from pipeline.prune.surgery.reinit import post_norm_modules
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model
from pipeline.stages.build import absorb_norms
from pipeline.stages.calibration import calibration
from tests.tiny import save_tiny, tiny_model
from tests.tiny_text import configured
from tests.world import make_world, pipeline, settings

CUT = "stages=[importance,shape,plan,cut,absorb_norms]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("absorb"), "glm4")


def made(world, *overrides):
    return runner.run(configured(*settings(world, run="unit"), *overrides), "a test")


@pytest.fixture(scope="module")
def kept(world):
    """The student with its post-norms."""
    return made(world, CUT, "reinit.absorb=false")


def gains(folder):
    source = open_checkpoint(folder)
    return {name: source[f"{name}.weight"] for name in post_norm_modules(source.anatomy)}


def test_fitted_scales_are_written_and_nothing_else_changes(world, kept):
    found = made(world, CUT, "reinit.absorb=fitted", "reinit.absorb_tokens=1024")["initial_student"]
    before, after = open_checkpoint(kept["initial_student"]), open_checkpoint(found)
    assert set(after.config["pruned"]["scales"]) == set(post_norm_modules(before.anatomy))
    text = islice(stream(Packed(kept["tokens"] / "calibration"), 8, 0, 1, 0, 0), 4)
    model = decoder_of(load_model(kept["initial_student"], torch.float64, "eager"))
    wanted = dict(fitted_scales(model, before.anatomy, text, torch.device("cpu"), lambda sums: None))
    for name in before:
        if name.removesuffix(".weight") not in wanted:
            assert torch.equal(after[name], before[name]), name
    for name, scale in gains(found).items():  # within the rounding of bf16, in which the stage may compute
        assert (scale - wanted[name]).norm() / wanted[name].norm() < 3e-2, name


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_ranks_measures_the_same_text(world, kept, world_size):
    requested = configured(
        *settings(world), "reinit.absorb_tokens=640", "calibration.batch_size=3"
    )  # no multiple of a step of ranks

    def read(size):
        batches = [calibration(requested, kept, 640, SimpleNamespace(rank=rank, world=size)) for rank in range(size)]
        return sorted(tuple(row.tolist()) for share in batches for batch in share for row in batch)

    assert read(world_size) == read(1) and len(read(1)) == 640 // requested.data.sequence_length


def test_removed_scales_are_ones_whatever_the_tokens(world, kept):
    first, second = (made(world, CUT, "reinit.absorb=removed", f"reinit.absorb_tokens={n}") for n in (512, 1024))
    assert first["initial_student"] == second["initial_student"] != kept["initial_student"]
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in gains(first["initial_student"]).values())


def test_the_methods_name_different_artifacts():
    result = {way: absorb_norms.settings(configured(f"reinit.absorb={way}")) for way in ("auto", "fitted")}
    assert result["fitted"] == result["auto"] | {"absorb": "fitted"} != result["auto"]


def test_a_student_with_fitted_scales_recovers_and_folds_to_its_plain_class(world):
    chosen = ("reinit.absorb=fitted", "evaluate.speed=false", "distill.tokens=512")
    pipeline("run=folded", *settings(world), *chosen, cwd=world)
    assert open_checkpoint(world / "runs" / "folded" / "student").config["model_type"] == "glm"


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
@pytest.mark.parametrize("way", ["fitted", "removed"])
def test_a_model_without_norms_on_both_sides_is_refused_by_name_and_left_alone_by_auto(kind, way, tmp_path):
    folder = save_tiny(tiny_model(kind, dtype=torch.float32), tmp_path / "model")
    requested = configured(f"model.path={folder}", f"reinit.absorb={way}")
    with pytest.raises(ValueError, match=rf"^reinit\.absorb: {way} .*{kind}"):
        absorb_norms.check(requested)
    with pytest.raises(ValueError, match=rf"^reinit\.absorb: {way} .*{kind}"):  # of a model that was not at hand before
        absorb_norms.applies(requested, {"initial_student": folder})
    auto = configured(f"model.path={folder}")
    absorb_norms.check(auto)
    assert not absorb_norms.applies(auto, {"initial_student": folder})


@pytest.mark.parametrize("way", ["fitted", "removed"])
def test_a_line_without_the_stage_cannot_do_what_is_asked_by_name(way):
    with pytest.raises(ValueError, match=rf"^reinit\.absorb: {way} .*absorb_norms.*recipe\.stages"):
        configured("recipe.stages=[importance,shape,plan,cut,export]", f"reinit.absorb={way}")


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match=r"^reinit\.absorb: .*folded"):
        configured("reinit.absorb=folded")

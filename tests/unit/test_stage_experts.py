"""Experts through the stages: those of the highest scores stay, and the student is the model that never routes to the
others, in float64."""

import json

import pytest
import torch

from pipeline import runner
from pipeline.model.blueprint import Blueprint
from pipeline.model.mixture import Routing
from pipeline.model.scores import Scores
from pipeline.runtime.checkpoint import open_checkpoint
from tests.mixtures import loaded, mixture_world, never_routed
from tests.tiny import tokens
from tests.tiny_text import configured
from tests.world import make_world, settings

CUT = "stages=[importance,shape,plan,cut]"
KEPT = {"qwen3_moe": 3, "mixtral": 2, "olmoe": 3, "deepseek_v3-groups": 4, "glm4_moe": 3, "gpt_oss": 3}


def made(world, *overrides, **values):
    given = {"shape__layers": None, "shape__neurons": None, "score__tokens": 512} | values
    return runner.run(configured(*settings(world, run="unit", **given), *overrides), "a test")


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("kind", KEPT)
def test_the_student_of_the_stages_is_the_model_that_never_routes_to_removed_experts(kind, tmp_path):
    world = mixture_world(tmp_path, kind)
    folders = made(world, CUT, shape__experts=KEPT[kind])
    blueprint, scores = Blueprint.load(folders["blueprint"]), Scores.load(folders["scores"])
    source, student = open_checkpoint(folders["teacher"]), open_checkpoint(folders["initial_student"])
    of = source.anatomy
    total, groups = of.sizes.carried["e"], of.routing.groups
    for plan in blueprint.layers:
        assert len(plan.experts) == (KEPT[kind] if of.sparse(plan.host) else 0)
        for group in range(groups if plan.experts else 0):
            members = range(group * total // groups, (group + 1) * total // groups)
            kept, removed = ([e for e in members if (e in plan.experts) == stays] for stays in (True, False))
            assert len(kept) == KEPT[kind] // groups
            assert scores.experts[plan.host][kept].min() >= scores.experts[plan.host][removed].max()
    assert student.anatomy.sizes.carried["e"] == KEPT[kind]
    assert student.config[of.family.top_k] == source.config[of.family.top_k]
    teacher = loaded(folders["teacher"])
    whole = logits(teacher)
    with never_routed(teacher, blueprint, total):
        wanted = logits(teacher)
    assert torch.equal(logits(teacher), whole) and (wanted - whole).norm() / whole.norm() > 1e-3
    assert (logits(loaded(folders["initial_student"])) - wanted).norm() / wanted.norm() < 1e-6


def test_random_experts_are_another_choice_that_the_seed_decides(tmp_path):
    world = mixture_world(tmp_path, "mixtral")
    chosen = [
        Blueprint.load(made(world, CUT, "plan.experts=random", f"seed={seed}", shape__experts=2)["blueprint"])
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_rounds_approach_the_number_of_experts(tmp_path):
    world = mixture_world(tmp_path, "mixtral", torch.float32)
    rounds = ["recipe.rounds=2", "recipe.repeat=[importance,shape,plan,cut]"]
    folders = made(world, CUT, *rounds, shape__experts=2)
    assert json.loads((folders["blueprint"] / "step.json").read_text())["layers"][0]["experts"] != []
    assert [len(plan.experts) for plan in Blueprint.load(folders["blueprint"]).layers] == [2] * 4
    counts = {open_checkpoint(path).anatomy.sizes.carried["e"] for path in (world / "artifacts").glob("cut-*")}
    assert counts == {2, 3}


@pytest.mark.parametrize("kind, experts", [("mixtral", 1), ("mixtral", 5), ("deepseek_v3-groups", 5), ("llama", 2)])
def test_an_impossible_number_of_experts_is_refused_before_any_work(kind, experts, tmp_path):
    world = make_world(tmp_path, kind)
    with pytest.raises(ValueError, match=r"^shape\.experts: "):
        made(world, CUT, shape__experts=experts)
    assert not (world / "artifacts").exists() or not list((world / "artifacts").glob("importance-*"))


def test_routing_by_groups_needs_enough_experts_in_the_groups_that_a_token_chooses():
    routing = Routing(top=4, groups=4, chosen=2)
    routing.check(8, 16)
    for count in (4, 6, 20):
        with pytest.raises(ValueError, match=r"^shape\.experts: "):
            routing.check(count, 16)

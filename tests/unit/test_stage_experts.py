"""Experts through the stages: those of the highest scores stay, and the student is the model that never routes to the
others, in float64."""

import pytest
import torch

from pipeline.model.blueprint import Blueprint
from pipeline.model.mixture import Routing
from pipeline.model.scores import Scores
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint
from tests.mixtures import CUT, loaded, made, mixture_world, never_routed
from tests.tiny import tokens
from tests.world import make_world

KEPT = {
    "qwen3_moe": 3,
    "mixtral": 2,
    "olmoe": 3,
    "deepseek_v3-groups": 4,
    "glm4_moe": 3,
    "gpt_oss": 3,
    "llama4_text": 3,
    "gemma4_text-experts": 3,
}


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


def test_the_seed_decides_which_random_experts_stay(tmp_path):
    world = mixture_world(tmp_path, "mixtral")
    chosen = [
        Blueprint.load(made(world, CUT, "plan.experts=random", f"seed={seed}", shape__experts=2)["blueprint"])
        for seed in (0, 1)
    ]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("kind, experts", [("mixtral", 1), ("mixtral", 5), ("deepseek_v3-groups", 5), ("llama", 2)])
def test_an_impossible_number_of_experts_is_refused_before_any_work(kind, experts, tmp_path):
    world = make_world(tmp_path, kind)
    with pytest.raises(ValueError, match=r"^shape\.experts: "):
        made(world, CUT, shape__experts=experts)
    assert not (world / "artifacts").exists() or not list((world / "artifacts").glob("importance-*"))


@pytest.mark.parametrize(
    "kind, setting, stages, others",
    [
        ("deepseek_v3", "restore.order", "obs_order", ["restore.order=obs", "plan.clap=false"]),
        ("mixtral", "plan.widths", "supernet", ["plan.widths=evolved", "plan.clap=false"]),
    ],
)
def test_methods_that_need_an_ffn_of_its_own_refuse_experts(kind, setting, stages, others, tmp_path):
    order = {
        "obs_order": "importance,shape,hessian,obs_order",
        "supernet": "importance,shape,supernet",
    }
    with pytest.raises(ValueError, match=f"^{setting}"):
        made(make_world(tmp_path, kind), f"stages=[{order[stages]}]", "restore.tokens=256", *others, shape__experts=3)


def test_routing_by_groups_needs_enough_experts_in_the_groups_that_a_token_chooses():
    routing = Routing(top=4, groups=4, chosen=2)
    routing.check(8, 16)
    for count in (4, 6, 20):
        with pytest.raises(ValueError, match=r"^shape\.experts: "):
            routing.check(count, 16)


def silenced(model, of, blueprint):
    """Zero, in place, what removed neurons of experts write."""
    for plan in (plan for plan in blueprint.layers if plan.expert_neurons):
        module = model.get_submodule(of.expert_module(plan.host))
        total = of.sizes.carried["x"]
        for expert, kept in zip(plan.experts or range(of.sizes.carried["e"]), plan.expert_neurons, strict=True):
            gone = [neuron for neuron in range(total) if neuron not in kept]
            weight = module.down_proj[expert].T if not module.is_transposed else module.down_proj[expert]
            with torch.no_grad():
                weight[gone] = 0.0


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def test_removed_neurons_of_experts_write_nothing(kind, tmp_path):
    world = mixture_world(tmp_path, kind)
    folders = made(world, CUT, shape__experts=3, shape__expert_neurons=8)
    blueprint, scores = Blueprint.load(folders["blueprint"]), Scores.load(folders["scores"])
    of, student = open_checkpoint(folders["teacher"]).anatomy, open_checkpoint(folders["initial_student"])
    for plan in blueprint.layers:
        for expert, kept in zip(plan.experts, plan.expert_neurons, strict=True):
            assert kept == tuple(sorted(scores.expert_neurons[plan.host][expert].topk(8).indices.tolist()))
    assert (student.anatomy.sizes.carried["e"], student.anatomy.sizes.carried["x"]) == (3, 8)
    teacher = loaded(folders["teacher"])
    silenced(teacher, of, blueprint)
    with never_routed(teacher, blueprint, of.sizes.carried["e"]):
        wanted = logits(teacher)
    assert (logits(loaded(folders["initial_student"])) - wanted).norm() / wanted.norm() < 1e-6


def test_rounds_narrow_experts_step_by_step(tmp_path):
    world = mixture_world(tmp_path, "qwen3_moe")
    rounds = ["recipe.rounds=2", "recipe.repeat=[importance,shape,plan,cut]", "reinit.slnp=false"]
    folders = made(world, CUT, *rounds, shape__experts=2, shape__expert_neurons=6)
    source, last = open_checkpoint(folders["teacher"]), open_checkpoint(folders["initial_student"])
    once = dict(cut(source.anatomy, Blueprint.load(folders["blueprint"]), source))
    assert set(once) == set(last) and all(torch.equal(tensor, last[name]) for name, tensor in once.items())
    sizes = [open_checkpoint(path).anatomy.sizes.carried for path in (world / "artifacts").glob("cut-*")]
    assert {(each["e"], each["x"]) for each in sizes} == {(3, 9), (2, 6)}


@pytest.mark.parametrize(
    "kind, setting, neurons, shared",
    [
        ("deepseek_v3", "expert_neurons", 7, None),  # 24 neurons of shared experts are no multiple of 7
        ("deepseek_v3", "expert_neurons", 6, 20),
        ("deepseek_v3", "shared_neurons", None, 30),
        ("hunyuan_v1_moe", "expert_neurons", 6, None),  # one field states both
        ("mixtral", "shared_neurons", 6, 6),
        ("mixtral", "expert_neurons", 25, None),
        ("mixtral", "expert_neurons", 12, None),  # no multiple of 8, as the teacher's 24 are
        ("llama", "expert_neurons", 6, None),
        ("llama", "shared_neurons", None, 6),
    ],
)
def test_an_impossible_number_of_neurons_of_experts_is_refused(kind, setting, neurons, shared, tmp_path):
    with pytest.raises(ValueError, match=rf"^shape\.{setting}: "):
        made(make_world(tmp_path, kind), CUT, shape__expert_neurons=neurons, shape__shared_neurons=shared)


# By kind: neurons of a routed expert and of the shared ones, and the config fields that state them
SHARED = {
    "qwen2_moe": (7, 9, {"moe_intermediate_size": 7, "shared_expert_intermediate_size": 9}),
    "deepseek_v3": (6, None, {"moe_intermediate_size": 6, "n_shared_experts": 4}),
    "glm4_moe": (6, 12, {"moe_intermediate_size": 6, "n_shared_experts": 2}),
    "dots1": (None, 12, {"moe_intermediate_size": 12, "n_shared_experts": 1}),
    "hunyuan_v1_moe": (8, 8, {"intermediate_size": 8}),
    "minimax_m3_vl_text": (None, 8, {"intermediate_size": 24, "shared_intermediate_size": 8}),
    "hy_v3": (8, 16, {"moe_intermediate_size": 8, "num_shared_experts": 2}),
}


@pytest.mark.parametrize("kind", SHARED)
def test_routed_and_shared_experts_are_narrowed_apart(kind, tmp_path):
    inner, shared, fields = SHARED[kind]
    world = mixture_world(tmp_path, kind)
    folders = made(world, CUT, shape__expert_neurons=inner, shape__shared_neurons=shared)
    blueprint, scores = Blueprint.load(folders["blueprint"]), Scores.load(folders["scores"])
    source, student = open_checkpoint(folders["teacher"]), open_checkpoint(folders["initial_student"])
    of = source.anatomy
    assert {field: student.config[field] for field in fields} == fields
    teacher = loaded(folders["teacher"])
    for plan in blueprint.layers:
        if shared and of.sparse(plan.host):
            assert plan.shared == tuple(sorted(scores.shared[plan.host].topk(shared).indices.tolist()))
            gone = [neuron for neuron in range(of.sizes.carried["y"]) if neuron not in plan.shared]
            with torch.no_grad():
                teacher.get_submodule(of.shared_module.format(layer=plan.host)).weight[:, gone] = 0.0
    if inner:
        silenced(teacher, of, blueprint)
    wanted = logits(teacher)
    assert (logits(loaded(folders["initial_student"])) - wanted).norm() / wanted.norm() < 1e-6


def test_rounds_narrow_what_one_field_states_in_the_last_one(tmp_path):
    world = mixture_world(tmp_path, "deepseek_v3")
    rounds = ["recipe.rounds=2", "recipe.repeat=[importance,shape,plan,cut]", "reinit.slnp=false"]
    folders = made(world, CUT, *rounds, shape__experts=2, shape__expert_neurons=6, shape__shared_neurons=18)
    source, last = open_checkpoint(folders["teacher"]), open_checkpoint(folders["initial_student"])
    once = dict(cut(source.anatomy, Blueprint.load(folders["blueprint"]), source))
    assert set(once) == set(last) and all(torch.equal(tensor, last[name]) for name, tensor in once.items())
    sizes = [open_checkpoint(path).anatomy.sizes.carried for path in (world / "artifacts").glob("cut-*")]
    assert {(each["e"], each["x"], each["y"]) for each in sizes} == {(3, 12, 24), (2, 6, 18)}


def test_restored_experts_do_not_depend_on_how_many_matrices_fit_in_memory(tmp_path):
    world = mixture_world(tmp_path, "qwen2_moe", torch.float32, moe_intermediate_size=16)
    chosen = {"shape__experts": 3, "shape__expert_neurons": 8, "shape__shared_neurons": 8, "restore__outputs": True}
    stages = "stages=[importance,shape,hessian,plan,cut]"
    together = made(world, stages, **chosen)
    apart = made(world, stages, "restore.memory=1", f"artifacts={world / 'apart'}", **chosen)
    plain = made(world, stages, **chosen | {"restore__outputs": False})
    one, other, cut_only = (open_checkpoint(each["initial_student"]) for each in (together, apart, plain))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    changed = {name for name in one if not torch.equal(one[name], cut_only[name])}
    assert changed == {name for name in one if name.endswith("down_proj.weight")}

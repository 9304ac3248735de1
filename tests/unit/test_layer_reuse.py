"""Layers that reuse what earlier ones compute, fields that single layers have of their own, embeddings of layers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import api, runner
from pipeline.model.blueprint import everything
from pipeline.model.causal import decoder_of
from pipeline.model.shape import Shape, check_depth
from pipeline.model.sizes import LayerSizes
from pipeline.prune.importance.measure import only_layers
from pipeline.prune.passes.layerwise import layers_of, recorded
from pipeline.prune.plan import DEPTH_POLICIES, kept_layers
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.cut_models import anatomy, assert_close, export, logits
from tests.laws import plan_of
from tests.tiny import save_tiny, tensors_of, tiny_model, tokens
from tests.tiny_text import configured
from tests.world import make_world, settings

KIND = "gemma4_text"  # sliding, full, sliding | full, sliding, full: the last three read the keys of layers 1 and 2
FIRST_FORM = {"global_head_dim": 16, "num_global_key_value_heads": None}


def rewritten(folder, changes, tensors=()):
    """Change fields of a config.json, None for removed ones, and add tensors to the weights."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | dict(tensors), weights, metadata={"format": "pt"})
    return folder


def test_the_layers_whose_keys_are_read_and_the_last_one_stay_under_every_policy():
    of = anatomy(tiny_model(KIND))
    assert of.reused_from == {3: 1, 4: 2, 5: 1} and set(of.required_layers) == {1, 2, 5}
    assert of.protected_layers(1) == {0, 1, 2, 5}
    influence = torch.tensor([0.9, 0.1, 0.1, 0.8, 0.9, 0.0])
    for policy in DEPTH_POLICIES:
        assert set(kept_layers(influence, 5, policy, of.protected_layers(1))) == {0, 1, 2, 3, 4, 5} - {
            4 if policy == "last" else 3
        }
    with pytest.raises(
        ValueError, match=r"shape\.layers is 3; it must lie between 4 and 6; layers that must stay .*: 0, 1, 2, 5"
    ):
        check_depth(3, 6, of.protected_layers(1))
    with pytest.raises(ValueError, match=r"plan\.depth=contiguous: no 2 consecutive layers can be removed"):
        kept_layers(influence, 4, "contiguous", {0, 2, 4})


def test_layers_that_select_positions_for_later_ones_stay_and_those_that_do_not_can_go(tmp_path):
    model = tiny_model("glm_moe_dsa")
    model.set_experts_implementation("eager")
    of = anatomy(model)
    assert of.reused_from == {1: 0, 2: 0} and set(of.required_layers) == {0}
    whole = everything(of.sizes)
    folder = export(model, replace(whole, layers=tuple(whole.layers[host] for host in (0, 2, 3))), tmp_path / "s")
    assert json.loads((folder / "config.json").read_text())["indexer_types"] == ["full", "shared", "full"]
    student = load_model(folder, torch.float64, "eager")
    student.set_experts_implementation("eager")
    with only_layers(model, 4, (0, 2, 3)):  # what layer 0 selects passes by layer 1
        assert_close(logits(student), logits(model))
    with pytest.raises(
        ValueError, match=r"layer 0 of .* must stay.*: later layers have no self_attn\.indexer of their own"
    ):
        replace(whole, layers=whole.layers[1:]).check(of)


@pytest.mark.parametrize(
    "hosts, message",
    [
        (
            (0, 2, 3, 4, 5),
            r"layer 1 of .* must stay.*: later layers have no self_attn.k_proj and .* reuse what it computes",
        ),
        ((0, 1, 2, 3, 4), r"layer 5 of .* must stay.*: the class makes its last layer one of full attention"),
        ((1, 0, 2, 3, 4, 5), r"reuse results of earlier ones; sort them"),
    ],
)
def test_plans_without_them_or_out_of_order_are_refused(hosts, message):
    of = anatomy(tiny_model(KIND))
    whole = everything(of.sizes)
    with pytest.raises(ValueError, match=message):
        replace(whole, layers=tuple(whole.layers[host] for host in hosts)).check(of)


def test_a_student_states_how_many_of_its_layers_read_earlier_keys_and_what_each_has_of_its_own(tmp_path):
    model = tiny_model(KIND)
    of = anatomy(model)
    whole = everything(of.sizes)
    student = replace(whole, layers=tuple(whole.layers[host] for host in (1, 2, 3, 5)))
    folder = export(model, student, tmp_path / "s")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_kv_shared_layers"] == 2 and config["layer_types"][0] == "full_attention"
    assert config["per_layer_config"] == {str(place): {"head_dim": 16} for place in (0, 2, 3)}
    assert (config["global_head_dim"], config["num_global_key_value_heads"]) == (16, None)  # for older programs
    read = open_checkpoint(folder)
    read.check()
    assert read["model.embed_tokens_per_layer.weight"].shape == (96, 4 * 6)
    with only_layers(model, 6, (1, 2, 3, 5)):
        wanted = logits(model)
    assert_close(logits(load_model(folder, torch.float64, "eager")), wanted)


def test_files_of_the_first_form_and_with_keys_that_no_layer_reads_are_read(tmp_path):
    model = tiny_model(KIND, dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "m")
    plain = open_checkpoint(folder)
    unused = {f"model.layers.4.self_attn.{name}_proj.weight": torch.ones(16, 32) for name in "kv"}
    rewritten(folder, FIRST_FORM | {"per_layer_config": None}, unused)
    read = open_checkpoint(folder)
    read.check()
    assert read.anatomy == plain.anatomy
    assert read.notes == [f"2 tensors that the class does not have are left out: {', '.join(sorted(unused))}"]
    assert torch.equal(logits(load_model(folder, torch.float32, "eager")), logits(model))


def test_fields_of_single_layers_are_found_in_models_of_ten_layers_and_more(tmp_path):
    kinds = [*("sliding_attention",) * 5, "full_attention"] * 2
    model = tiny_model("gemma4_text-plain", num_hidden_layers=12, layer_types=kinds)
    assert list(model.config.to_dict()["per_layer_config"]) == ["05", "11"]  # as a file of it has them
    source = open_checkpoint(save_tiny(model, tmp_path / "m"))
    source.check()
    assert source.anatomy == api.anatomy(model)
    whole = everything(source.anatomy.sizes)
    student = replace(whole, layers=(*whole.layers[:1], *whole.layers[4:]))
    folder = export(model, student, tmp_path / "s")
    assert list(json.loads((folder / "config.json").read_text())["per_layer_config"]) == ["2", "8"]
    with only_layers(model, 12, (0, *range(4, 12))):
        assert_close(logits(load_model(folder, torch.float64, "eager")), logits(model))


def test_two_streams_that_take_turns_through_the_layers_each_read_their_own_keys():
    model = tiny_model(KIND)
    of, decoder = anatomy(model), decoder_of(model)
    layers = layers_of(dict(decoder.named_modules(prefix=of.family.decoder)), of)
    (step,) = recorded(decoder, layers, [tokens()])
    other = step.twin()
    other.hidden.mul_(0.5)
    alone = other.twin()
    for index, layer in enumerate(layers):
        alone.advance(layer, index, torch.device("cpu"))
    for index, layer in enumerate(layers):
        step.advance(layer, index, torch.device("cpu"))
        other.advance(layer, index, torch.device("cpu"))
    assert_close(decoder.norm(step.hidden), decoder(tokens(), use_cache=False).last_hidden_state)
    assert torch.equal(other.hidden, alone.hidden)


def test_widths_are_bounded_in_units_of_what_the_config_states():
    doubled = LayerSizes(4, 2, 48, 2)
    assert LayerSizes(4, 2, 16).within(doubled) == LayerSizes(4, 2, 32, 2)
    assert LayerSizes(4, 2, 48, 2).within(LayerSizes(4, 2, 20)) == LayerSizes(4, 2, 20)
    assert LayerSizes(4, 2, 31, 2).for_config == LayerSizes(4, 2, 16)
    sizes = anatomy(tiny_model(KIND)).sizes
    assert sizes.uniform and [widths.neurons for widths in sizes.layers] == [24, 24, 24, 48, 48, 48]
    odd = (*sizes.layers[:5], LayerSizes(4, 2, 47, 2))
    assert not replace(sizes, layers=odd).uniform


def test_a_file_that_leaves_the_head_size_to_the_class_is_read(tmp_path):
    model = tiny_model(KIND, head_dim=256, global_head_dim=512)
    folder = rewritten(save_tiny(model, tmp_path / "m"), {"head_dim": None})
    source = open_checkpoint(folder)
    source.check()
    assert source.anatomy.sizes.head_size == 256


@pytest.mark.parametrize("axes", ["all", "layers"])
def test_a_budget_chooses_among_shapes_with_the_layers_that_must_stay(axes, tmp_path):
    world = make_world(tmp_path, KIND)
    given = settings(world, run="unit", shape__layers=None, shape__neurons=None)
    small = [*given, "stages=[shape]", f"budget.axes={axes}"]
    folder = runner.run(configured(*small, f"budget.parameters={0.4 if axes == 'all' else 0.8}"), "a test")["shape"]
    assert Shape.load(folder).layers >= 4
    with pytest.raises(ValueError, match=r"^budget\.parameters: .* cannot be reached; this model reaches"):
        runner.run(configured(*small, "budget.parameters=0.02"), "a test")


@pytest.mark.parametrize(
    "overrides",
    [
        ["budget.bytes=60000", "budget.context=64"],
        ["budget.bytes=60000", "budget.context=64", "budget.axes=sublayers"],
        ["budget.speedup=1.1"],
        ["shape.layers=5", "dry_run=true", "stages=null"],
    ],
)
def test_a_cache_and_speeds_of_other_head_sizes_are_not_predicted(overrides, tmp_path):
    given = settings(make_world(tmp_path, KIND), run="unit", shape__layers=None, shape__neurons=None)
    with pytest.raises(ValueError, match=r"head size|KV heads differ by layer type"):
        runner.run(configured(*given, "stages=[shape]", *overrides), "a test")


def test_what_the_class_divides_by_the_root_of_the_hidden_size_is_scaled_with_it():
    model = tiny_model("gemma4_text-all")
    of, source = anatomy(model), tensors_of(model)
    blueprint = plan_of(of, "hidden")
    student = dict(cut(of, blueprint, source))
    channels = torch.tensor(blueprint.channels)
    scale = (len(channels) / of.sizes.hidden) ** 0.5
    for name, along in (("model.per_layer_model_projection.weight", 1), ("model.layers.3.router.scale", 0)):
        assert torch.allclose(student[name], source[name].index_select(along, channels) * scale, rtol=1e-12)

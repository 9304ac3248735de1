"""Laws of the tables: for every family, on a tiny random model of the real class, in float64."""

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, Group, LayerPlan, everything
from pipeline.model.families import family_of
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint import load_model, open_checkpoint, write_checkpoint
from tests.tiny import CLASSES, config_of, save_tiny, tensors_of, tiny_model, tokens


def assert_close(one, other):
    """Equal up to the float32 in which the classes' norms and softmax compute, even inside a float64 model."""
    assert (one - other).norm() / other.norm() < 1e-5, (one - other).abs().max()


@pytest.fixture(params=CLASSES)
def model(request):
    return tiny_model(request.param)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def export(model, blueprint, folder):
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    config = student_config(config_of(model), anatomy, blueprint)
    write_checkpoint(folder, config, cut(anatomy, blueprint, tensors_of(model)), 20_000)
    return folder


def narrow_plan(sizes, layers=(0, 1, 2, 3)):
    """Half of the heads of every group, two thirds of the neurons: no hidden channel goes."""
    plans = tuple(
        LayerPlan(i, (Group(i, 0, (1,)), Group(i, 1, (2,))), tuple(n for n in range(24) if n % 3)) for i in layers
    )
    return Blueprint(tuple(range(sizes.hidden)), plans)


def test_keeping_everything_is_bit_identical(model):
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    kept = dict(cut(anatomy, everything(anatomy.sizes), tensors_of(model)))
    assert kept.keys() == tensors_of(model).keys()
    for name, tensor in tensors_of(model).items():
        assert torch.equal(kept[name], tensor), name


def test_the_table_counts_the_parameters_of_the_class(model):
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    assert anatomy.parameters()[0] == model.num_parameters()


def test_a_cut_folder_reloads_with_no_missing_or_unexpected_key(model, tmp_path):
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    folder = export(model, narrow_plan(anatomy.sizes, (0, 2)), tmp_path / "student")
    assert len(list(folder.glob("*.safetensors"))) > 1
    student = load_model(folder, torch.float64, "eager")
    assert student.config.num_hidden_layers == 2
    assert student.config.num_attention_heads == 2
    assert student.config.intermediate_size == 16
    assert torch.isfinite(logits(student)).all()


def test_cutting_heads_and_neurons_equals_masking_them(model, tmp_path):
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    if model.config.model_type == "olmo2":
        pytest.skip("its QK-norm spans the heads: see test_olmo2_heads")
    blueprint = narrow_plan(anatomy.sizes)
    student = load_model(export(model, blueprint, tmp_path / "s"), torch.float64, "eager")
    with torch.no_grad():
        for layer in model.model.layers:
            columns = layer.self_attn.o_proj.weight.view(32, 4, 8)
            columns[:, [0, 3]] = 0.0
            layer.mlp.down_proj.weight[:, [n for n in range(24) if n % 3 == 0]] = 0.0
    assert_close(logits(model), logits(student))


def test_cutting_a_kv_group_equals_masking_its_heads(model, tmp_path):
    if model.config.model_type == "olmo2":
        pytest.skip("its QK-norm spans the heads: see test_olmo2_heads")
    plans = tuple(LayerPlan(i, (Group(i, 1, (2, 3)),), tuple(range(24))) for i in range(4))
    blueprint = Blueprint(tuple(range(32)), plans)
    student = load_model(export(model, blueprint, tmp_path / "s"), torch.float64, "eager")
    assert student.config.num_key_value_heads == 1
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.view(32, 4, 8)[:, :2] = 0.0
    assert_close(logits(model), logits(student))


def test_olmo2_heads_cut_equals_masking_with_the_norm_taken_over_the_kept_rows(tmp_path):
    model = tiny_model("olmo2", rms_norm_eps=0.0)
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    student = load_model(export(model, narrow_plan(anatomy.sizes), tmp_path / "s"), torch.float64, "eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.view(4, 8, 32)[[0, 3]] = 0.0
            layer.self_attn.q_norm.weight.mul_(0.5**0.5)  # half of the rows carry the whole mean square
            layer.self_attn.o_proj.weight.view(32, 4, 8)[:, [0, 3]] = 0.0
            layer.mlp.down_proj.weight[:, [n for n in range(24) if n % 3 == 0]] = 0.0
    assert_close(logits(model), logits(student))


def test_layers_of_their_own_widths_equal_masking_and_reload(model, tmp_path):
    if model.config.model_type == "olmo2":
        pytest.skip("its QK-norm spans the heads")
    full = (Group(0, 0, (0, 1)), Group(0, 1, (2, 3)))
    plans = (
        LayerPlan(0, full, tuple(range(24))),
        LayerPlan(1, (Group(1, 0, (0, 1)),), tuple(range(8))),
        LayerPlan(2, (Group(2, 0, (1,)), Group(2, 1, (3,))), tuple(range(16))),
        LayerPlan(3, (Group(3, 1, (2,)),), tuple(range(24))),
    )
    folder = export(model, Blueprint(tuple(range(32)), plans), tmp_path / "s")
    student = load_model(folder, torch.float64, "eager")
    gone_heads, gone_neurons = [[], [2, 3], [0, 2], [0, 1, 3]], [24, 8, 16, 24]
    with torch.no_grad():
        for layer, heads, neurons in zip(model.model.layers, gone_heads, gone_neurons):
            layer.self_attn.o_proj.weight.view(32, 4, 8)[:, heads] = 0.0
            layer.mlp.down_proj.weight[:, neurons:] = 0.0
    assert_close(logits(model), logits(student))
    assert open_checkpoint(folder).anatomy.parameters()[0] == student.num_parameters()


def test_gemma_narrowed_embedding_keeps_its_magnitude(tmp_path):
    for kind in ("gemma2", "gemma3_text"):
        model = tiny_model(kind, num_attention_heads=2, num_key_value_heads=1)
        anatomy = anatomy_of(config_of(model), tensors_of(model))
        whole = everything(anatomy.sizes)
        blueprint = Blueprint(tuple(range(16)), whole.layers)
        student = load_model(export(model, blueprint, tmp_path / kind), torch.float64, "eager")
        x = tokens()
        assert torch.allclose(student.model.embed_tokens(x), model.model.embed_tokens(x)[..., :16], rtol=1e-6)
        with torch.no_grad():
            stream = torch.randn(1, 3, 16, dtype=torch.float64)
            got = student.lm_head(student.model.norm(stream))
            gain = 1.0 + model.model.norm.weight[:16]
            wanted = (stream / (stream.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()) * gain
            wanted = wanted @ model.lm_head.weight[:, :16].T
        assert_close(got, wanted)


def test_a_llama_whose_heads_do_not_divide_its_width_is_saved_as_mistral(tmp_path):
    model = tiny_model("llama")
    anatomy = anatomy_of(config_of(model), tensors_of(model))
    whole = everything(anatomy.sizes)
    blueprint = Blueprint(tuple(range(30)), narrow_plan(anatomy.sizes).layers[:3] + (whole.layers[3],))
    uniform = Blueprint(tuple(range(30)), whole.layers)
    student = load_model(export(model, uniform, tmp_path / "s"), torch.float64, "eager")
    assert type(student).__name__ == "MistralForCausalLM" and student.config.sliding_window is None
    mixed = load_model(export(model, blueprint, tmp_path / "m"), torch.float64, "eager")
    assert torch.isfinite(logits(mixed)).all()
    biased = tiny_model("llama-biases")
    with pytest.raises(ValueError, match="shape.hidden is 30, not a multiple of shape.heads"):
        export(biased, uniform, tmp_path / "b")


def test_an_unknown_family_says_what_a_table_needs():
    with pytest.raises(ValueError, match="model_type 'mamba' has no table.*axes"):
        family_of("mamba")


def test_a_checkpoint_that_does_not_match_its_table_is_refused():
    model = tiny_model("llama")
    names = dict(tensors_of(model))
    names["model.layers.0.self_attn.rogue.weight"] = names.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match="missing .*layers.1.mlp.up_proj.*unknown .*rogue"):
        anatomy_of(config_of(model), names)


def test_sharded_and_truncated_checkpoints(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "m")
    assert all(torch.equal(tensors_of(model)[name], tensor) for name, tensor in open_checkpoint(folder).items())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        open_checkpoint(folder)


def test_pickled_weights_are_refused_unless_asked_and_then_read_weights_only(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    folder = save_tiny(model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tensors_of(model), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.allow_pickle=true"):
        open_checkpoint(folder)
    read = open_checkpoint(folder, allow_pickle=True)
    assert all(torch.equal(read[k], v) for k, v in tensors_of(model).items())
    torch.save({"x": print}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        open_checkpoint(folder, allow_pickle=True)

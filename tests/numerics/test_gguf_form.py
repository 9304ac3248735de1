"""The scale of attention, folded into the queries for llama.cpp's graphs: the same logits, in float64."""

import pytest
import torch

from pipeline.model.gguf_form import GRAPHS, SCALAR, folded, graph_of, query_factor, windows_of
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.students import student
from tests.tiny import tiny_config, tokens

SCALED = ("gemma2", "gemma3_text")


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("scalar", [3, 24])
def test_the_folded_model_has_the_logits_of_the_student_at_the_scale_of_the_graph(kind, scalar, tmp_path):
    source = student(kind, tmp_path / "s", query_pre_attn_scalar=scalar, attention_bias=kind == "gemma2")
    graph = graph_of(source.config)
    assert query_factor(source.config, graph) == (8 / scalar) ** 0.5
    config, tensors = folded(source.config, graph, source.items())
    assert config[SCALAR] == 8 == config["head_dim"]
    write_checkpoint(tmp_path / "folded", config, tensors, 1e9, source.folder)
    models = [load_model(folder, torch.float64, "eager") for folder in (source.folder, tmp_path / "folded")]
    with torch.no_grad():
        expected, found = (model(tokens()).logits for model in models)
    assert (found - expected).norm() / expected.norm() < 1e-6  # the classes' norms compute in float32


@pytest.mark.parametrize("kind", SCALED)
def test_the_graph_of_the_published_number_of_layers_divides_by_the_mean_head_size(kind):
    layers = GRAPHS[kind].published
    fields = {"num_hidden_layers": layers, "query_pre_attn_scalar": 6, "hidden_size": 96, "num_attention_heads": 4}
    config = tiny_config(kind, **fields, layer_types=None).to_dict()
    assert query_factor(config, GRAPHS[kind]) == (24 / 6) ** 0.5
    assert query_factor(config | {"num_hidden_layers": layers - 1}, GRAPHS[kind]) == (8 / 6) ** 0.5


def test_gains_are_scaled_and_not_what_is_stored_of_them():
    graph = GRAPHS["gemma3_text"]
    config = config_of_kind("gemma3_text", query_pre_attn_scalar=2)
    stored = {f"model.layers.0.self_attn.{each}_norm.weight": torch.full((8,), 0.5) for each in "qk"}
    scaled = dict(folded(config, graph, stored.items())[1])
    assert torch.equal(scaled["model.layers.0.self_attn.q_norm.weight"] + 1, torch.full((8,), 3.0))  # 1.5 * sqrt(8 / 2)
    assert torch.equal(scaled["model.layers.0.self_attn.k_norm.weight"], torch.full((8,), 0.5))


def test_low_precision_is_scaled_in_float32():
    graph, name = GRAPHS["gemma2"], "model.layers.0.self_attn.q_proj.weight"
    config = config_of_kind("gemma2", query_pre_attn_scalar=24)
    weight = torch.randn(4, 4).bfloat16()
    (found,) = dict(folded(config, graph, {name: weight}.items())[1]).values()
    assert found.dtype == torch.float32 and torch.equal(found, weight.float() * (8 / 24) ** 0.5)


def test_windows_are_those_of_the_layers_that_remain():
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = config_of_kind("gemma3_text", layer_types=kinds)
    assert windows_of(config, GRAPHS["gemma3_text"]) == [True, False, False, True]
    assert windows_of(config_of_kind("llama"), GRAPHS["llama"]) is None
    assert windows_of(config, GRAPHS["llama"]) is None


def test_types_that_were_not_compared_are_refused():
    with pytest.raises(ValueError, match="^export.gguf: llama.cpp has not been compared.*vaultgemma"):
        graph_of({"model_type": "vaultgemma"})


@pytest.mark.parametrize(
    "changed, refused",
    [
        ({"sliding_window": 8}, True),
        ({"sliding_window": 8, "use_sliding_window": False}, False),
        ({"sliding_window": 64}, False),  # as long as the longest text
        ({"sliding_window": None}, False),
    ],
)
def test_windows_that_the_graph_does_not_have_are_refused(changed, refused):
    config = config_of_kind("mistral") | changed
    if not refused:
        assert graph_of(config) == GRAPHS["mistral"]
        return
    with pytest.raises(ValueError, match="^export.gguf: .*mistral without sliding windows"):
        graph_of(config)


def config_of_kind(kind, **changed):
    return tiny_config(kind, **changed).to_dict()

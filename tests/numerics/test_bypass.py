"""Laws of the linear map in place of removed layers: least squares, folded exactly, never worse than removal."""

import pytest
import torch

from pipeline.model.blueprint import Blueprint, whole_layer
from pipeline.model.causal import decoder_of
from pipeline.model.hf_config import student_config
from pipeline.prune.surgery.bypass import Replaced, Sums, check_family, folded, gaps, sums_of
from pipeline.prune.surgery.cut import cut
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.restoration import HERE, anatomy
from tests.tiny import config_of, tensors_of, tiny_model, tokens

KEPT = (0, 1, 3)
KINDS = ("llama", "phi3", "granite", "cohere")


def plan(places) -> Blueprint:
    """The model without its layer 2."""
    return Blueprint(tuple(range(places.sizes.hidden)), tuple(whole_layer(places.sizes, layer) for layer in KEPT))


def streams(model, ids, count):
    """Return the stream after so many layers, [batch, sequence, h]."""
    with torch.no_grad():
        return model.model(input_ids=ids, output_hidden_states=True).hidden_states[count]


def batches():
    return [tokens(8, 24, seed=seed) for seed in range(3)]


def summed(model) -> dict[int, Sums]:
    places = anatomy(model)
    return sums_of(decoder_of(model), places, gaps(plan(places), 4), batches(), HERE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_has_the_stream_that_least_squares_gives(kind, tmp_path):
    model = tiny_model(kind)
    places, source = anatomy(model), tensors_of(model)
    (host, sums), *others = summed(model).items()
    assert host == 1 and not others
    through, left = sums.map(1e-9)
    changed = Replaced(source, folded(places, source, host, through))
    written = student_config(config_of(model), places, plan(places))
    write_checkpoint(tmp_path / "student", written, cut(places, plan(places), changed), 1e9)
    student = load_model(tmp_path / "student", torch.float64, "eager")
    ids = torch.cat(batches())
    start, wanted, got = streams(model, ids, 2), streams(model, ids, 3), streams(student, ids, 2)
    errors = [float((wanted - each).square().sum()) for each in (start, got)]
    assert errors[1] / errors[0] == pytest.approx(left, rel=1e-6) and left < 0.999
    residual = (wanted - got).flatten(0, 1)
    added = (got - start).flatten(0, 1)
    assert float((added.T @ residual).abs().max()) < 1e-6 * float(added.square().sum()), "normal equations"


def test_strong_damping_is_plain_removal_and_weak_damping_fits_best():
    sums = summed(tiny_model("llama"))[1]
    shares = [sums.map(damping)[1] for damping in (1e-9, 1e-2, 1.0, 1e9)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(sums.map(1e12)[0], torch.eye(32, dtype=torch.float64))


def test_a_bias_passes_through_the_map_too():
    model = tiny_model("llama", mlp_bias=True)
    places, source = anatomy(model), tensors_of(model)
    through = torch.randn(32, 32, dtype=torch.float64)
    changed = folded(places, source, 1, through)
    read = torch.randn(5, source["model.layers.1.mlp.down_proj.weight"].shape[1], dtype=torch.float64)
    names = [f"model.layers.1.mlp.down_proj.{kind}" for kind in ("weight", "bias")]
    before, after = (torch.nn.functional.linear(read, *map(tensors.get, names)) for tensors in (source, changed))
    torch.testing.assert_close(after, before @ through)


def test_gaps_end_before_the_next_remaining_layer_or_at_the_top():
    places = anatomy(tiny_model("llama"))
    hosts = [whole_layer(places.sizes, layer) for layer in (0, 2)]
    assert gaps(Blueprint((0,), tuple(hosts)), 4) == {0: 1, 2: 3}
    assert gaps(plan(places), 4) == {1: 2} and gaps(Blueprint((0,), tuple(hosts)), 3) == {0: 1}


def test_a_norm_after_the_ffn_and_experts_are_refused():
    for kind in ("gemma4_text-experts", "gemma2", "glm4", "olmo2"):
        with pytest.raises(ValueError, match=r"^reinit\.bypass: "):
            check_family(anatomy(tiny_model(kind)))

"""Laws of the principal basis: a full rotation changes nothing, a narrow one finds a narrow stream, SLNP is √(h/h')."""

from dataclasses import replace

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.blueprint import Blueprint, everything
from pipeline.model.hf_config import student_config
from pipeline.prune.second_order.hessian import gram
from pipeline.prune.second_order.restore import restore_outputs
from pipeline.prune.surgery.cut import cut
from pipeline.prune.surgery.reinit import stabilise_gains
from pipeline.prune.surgery.rotate import (
    principal_basis,
    rotate,
    rotate_tied,
    rotated_anatomy,
    tied_basis,
    tied_gain,
)
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.tiny import CLASSES, config_of, tensors_of, tiny_model, tokens

ROTATABLE = [kind for kind in CLASSES if kind not in ("gemma2", "gemma3_text", "glm4", "olmo2")]


def parts(kind, **changed):
    model = tiny_model(kind, **changed)
    return model, anatomy_of(config_of(model), tensors_of(model)), tensors_of(model)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def assert_close(one, other):
    """Equal up to the float32 in which the classes' norms and softmax compute, even inside a float64 model."""
    assert (one - other).norm() / other.norm() < 1e-5, (one - other).abs().max()


def orthogonal(size=32):
    draw = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q


def load_cut(model, anatomy, source, blueprint, folder):
    config = student_config(config_of(model), anatomy, blueprint) | {"tie_word_embeddings": anatomy.tied}
    stream = stabilise_gains(anatomy, blueprint, source, cut(anatomy, blueprint, source))
    write_checkpoint(folder, config, stream, 1e9)
    return load_model(folder, torch.float64, "eager")


@pytest.mark.parametrize("kind", ROTATABLE)
def test_a_full_basis_leaves_logits_unchanged(kind, tmp_path):
    model, anatomy, source = parts(kind)
    turned = rotate(anatomy, orthogonal(), source)
    whole = everything(anatomy.sizes)
    student = load_cut(model, rotated_anatomy(anatomy), turned, whole, tmp_path)
    assert student.config.tie_word_embeddings is False
    assert_close(logits(student), logits(model))
    assert not torch.allclose(student.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", ROTATABLE)
def test_the_view_has_the_tensors_of_its_anatomy_with_gains_of_one(kind):
    _, anatomy, source = parts(kind)
    turned = rotate(anatomy, orthogonal(), source)
    assert {name: tuple(tensor.shape) for name, tensor in turned.items()} == rotated_anatomy(anatomy).shapes()
    assert "lm_head.weight" in turned
    for pattern in anatomy.norms:
        assert torch.equal(turned[pattern.format(layer=2)] + anatomy.family.norm_offset, torch.ones(32).double())


def test_gains_stored_as_one_more_are_ones_in_the_view():
    _, anatomy, source = parts("gemma")
    turned = rotate(anatomy, orthogonal(), source)
    assert (turned["model.layers.0.input_layernorm.weight"] == 0.0).all()
    weight = source["model.layers.0.self_attn.q_proj.weight"]
    wanted = (weight * (1.0 + source["model.layers.0.input_layernorm.weight"])) @ orthogonal()
    torch.testing.assert_close(turned["model.layers.0.self_attn.q_proj.weight"], wanted)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "glm4", "olmo2"])
def test_families_with_post_norms_are_refused(kind):
    _, anatomy, source = parts(kind)
    with pytest.raises(ValueError, match="post-norms .* do not commute"):
        rotate(anatomy, orthogonal(), source)


def test_the_basis_is_orthonormal_sorted_and_of_fixed_signs():
    factor = torch.randn(60, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = factor.T @ factor
    basis = principal_basis(covariance)
    torch.testing.assert_close(basis.T @ basis, torch.eye(32).double(), rtol=0, atol=1e-12)
    spectrum = basis.T @ covariance @ basis
    assert (spectrum.diagonal().diff() <= 0).all()
    torch.testing.assert_close(spectrum, torch.diag(spectrum.diagonal()), rtol=0, atol=1e-9)
    torch.testing.assert_close(principal_basis(covariance.flip(0, 1)).flip(0), basis, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        principal_basis(covariance / 0.0)


def test_slnp_on_the_rotated_view_is_root_of_the_widths():
    _, anatomy, source = parts("llama-tied")
    turned = rotate(anatomy, orthogonal(), source)
    anatomy = rotated_anatomy(anatomy)
    blueprint = Blueprint(tuple(range(20)), everything(anatomy.sizes).layers)
    student = dict(stabilise_gains(anatomy, blueprint, turned, cut(anatomy, blueprint, turned)))
    for pattern in anatomy.norms:
        gain = student[pattern.format(layer=1)]
        torch.testing.assert_close(gain, torch.full((20,), (32 / 20) ** 0.5, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "phi3"])
def test_a_stream_of_few_directions_is_cut_to_them_without_loss(kind, tmp_path):
    """What every writer and embedding lies in 16 of 32 directions: the principal cut finds them and loses nothing."""
    model, anatomy, source = parts(kind, rms_norm_eps=1e-12, num_attention_heads=4, num_key_value_heads=2)
    few = orthogonal()[:, :16]
    with torch.no_grad():
        source["model.embed_tokens.weight"].copy_(source["model.embed_tokens.weight"] @ few @ few.T)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(few @ few.T @ linear.weight)
    basis = principal_basis(gram(model.model, anatomy, [tokens()], (), stream=True).stream)
    blueprint = Blueprint(tuple(range(16)), everything(anatomy.sizes).layers)
    student = load_cut(model, rotated_anatomy(anatomy), rotate(anatomy, basis, source), blueprint, tmp_path)
    assert student.config.hidden_size == 16
    assert_close(logits(student), logits(model))


def test_restoration_and_rotation_commute():
    model, anatomy, source = parts("llama-tied")
    grams = gram(model.model, anatomy, [tokens()], range(4), stream=False).inputs
    whole = everything(anatomy.sizes)
    plans = tuple(replace(plan, groups=plan.groups[:1], neurons=plan.neurons[:12]) for plan in whole.layers)
    basis, narrowed = orthogonal(), Blueprint(tuple(range(32)), plans)
    turned, after = rotate(anatomy, basis, source), rotated_anatomy(anatomy)
    one = dict(restore_outputs(after, narrowed, turned, grams, cut(after, narrowed, turned)))
    restored = dict(restore_outputs(anatomy, narrowed, source, grams, cut(anatomy, narrowed, source)))
    other = rotate(narrowed.student(anatomy), basis, restored)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-9)


def tied_parts(gain=None):
    """A tied model, its Gram matrices, and how often its calibration text holds each token."""
    model, anatomy, source = parts("llama-tied")
    if gain is not None:
        with torch.no_grad():
            source["model.norm.weight"].copy_(gain)
    grams = gram(model.model, anatomy, [tokens()], (), stream=True)
    counts = torch.bincount(tokens().flatten(), minlength=96)
    return model, anatomy, source, grams, counts


def fit(source, basis, kept, grams, counts):
    return tied_gain(basis, kept, source["model.norm.weight"], source["model.embed_tokens.weight"], counts, grams.final)


def standing_out():
    """A final gain that is even but for seven channels, one of them of the other sign."""
    gain = torch.full((32,), 1.7, dtype=torch.float64)
    gain[[1, 5, 9, 20, 21, 30, 31]] = torch.tensor([-2.0, 3.1, 0.2, 2.5, 5.0, 1.1, 0.9], dtype=torch.float64)
    return gain


@pytest.mark.parametrize(("gain", "axes"), [(standing_out(), 7), (None, 32)])
def test_a_head_stays_tied_without_loss_where_the_channels_that_stand_out_keep_their_axes(gain, axes, tmp_path):
    """Seven axes where seven gains stand out; all axes, a permutation, whatever the gains."""
    model, anatomy, source, grams, counts = tied_parts(gain)
    basis = tied_basis(grams.stream, source["model.norm.weight"], axes)
    turned = rotate_tied(anatomy, basis, fit(source, basis, 32, grams, counts), source)
    assert turned.keys() == source.keys()
    student = load_cut(model, anatomy, turned, everything(anatomy.sizes), tmp_path)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert_close(logits(student), logits(model))


@pytest.mark.parametrize("axes", [0, 7, 20, 32])
def test_a_tied_basis_is_orthonormal_by_energy_and_leaves_its_axes_alone(axes):
    _, _, source, grams, _ = tied_parts(standing_out())
    basis = tied_basis(grams.stream, source["model.norm.weight"], axes)
    torch.testing.assert_close(basis.T @ basis, torch.eye(32).double(), rtol=0, atol=1e-12)
    assert ((basis.T @ grams.stream @ basis).diagonal().diff() <= 1e-9).all()
    if axes >= 7:
        assert (basis[[1, 5, 9, 20, 21, 30, 31]].abs().max(1).values == 1.0).all()
    if axes == 0:
        torch.testing.assert_close(basis, principal_basis(grams.stream), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="33 axes"):
        tied_basis(grams.stream, source["model.norm.weight"], 33)


@pytest.mark.parametrize("kept", [32, 20])
def test_a_tied_gain_is_the_least_squares_fit_of_the_logits(kept):
    """Against the plain definition: all tokens' centred logits over the text, and any other gain errs more."""
    model, _, source, grams, counts = tied_parts()
    basis = principal_basis(grams.stream)
    gain = fit(source, basis, kept, grams, counts)
    used, table = basis[:, :kept], source["model.embed_tokens.weight"]
    factor = torch.linalg.eigh(grams.final)
    directions = factor.eigenvectors * factor.eigenvalues.clamp(min=0).sqrt()  # columns u with Σ u uᵀ as measured
    shares = (counts.double() + 0.1) / (counts.double() + 0.1).sum()

    def error(diagonal):
        gap = table @ (used * diagonal @ used.T - torch.diag(source["model.norm.weight"])) @ directions
        gap = gap - shares @ gap
        return float((shares[:, None] * gap.square()).sum())

    least = error(gain[:kept])
    for seed in range(20):
        step = torch.randn(kept, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert error(gain[:kept] + 1e-3 * step) > least
    assert least < error((used * used * source["model.norm.weight"][:, None]).sum(0))


def test_a_direction_without_energy_takes_the_median_gain():
    _, _, source, grams, counts = tied_parts()
    grams.final[:, 3] = grams.final[3] = 0.0
    basis = tied_basis(grams.stream, source["model.norm.weight"], 32)
    gain = fit(source, basis, 32, grams, counts)
    place = int(basis[3].argmax())
    assert gain[place] == pytest.approx(float(source["model.norm.weight"].median()), rel=1e-6)


def test_slnp_on_a_tied_view_is_root_of_the_widths():
    _, anatomy, source, grams, counts = tied_parts()
    basis = tied_basis(grams.stream, source["model.norm.weight"], 8)
    gain = fit(source, basis, 20, grams, counts)
    turned = rotate_tied(anatomy, basis, gain, source)
    blueprint = Blueprint(tuple(range(20)), everything(anatomy.sizes).layers)
    student = dict(stabilise_gains(anatomy, blueprint, turned, cut(anatomy, blueprint, turned)))
    torch.testing.assert_close(student["model.norm.weight"], gain[:20] * (32 / 20) ** 0.5, rtol=1e-12, atol=0)
    assert "lm_head.weight" not in student


def test_an_output_matrix_of_its_own_needs_no_fitted_gain():
    _, anatomy, source = parts("llama")
    with pytest.raises(ValueError, match="not tied"):
        rotate_tied(anatomy, orthogonal(), torch.ones(32), source)

"""Laws of fitted scales: least squares one norm after another, by streams layer by layer and by brute force alike."""

import copy
from functools import partial

import pytest
import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.model.families import FAMILIES
from pipeline.model.hf_config import with_scales
from pipeline.prune.importance.measure import inverse_rms
from pipeline.prune.surgery.absorption import fitted_scales, least_squares_scale, removed_scales
from pipeline.prune.surgery.reinit import absorb_post_norms, post_norm_modules, with_static_scales
from pipeline.runtime.checkpoint import open_checkpoint
from pipeline.runtime.checkpoint_writer import write_checkpoint
from pipeline.runtime.model_loader import load_model
from tests.processes import on_ranks
from tests.tiny import config_of, tensors_of, tiny_model, tokens

KINDS = sorted(kind for kind, family in FAMILIES.items() if family.sandwich)
HERE = torch.device("cpu")


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def batches():
    return [tokens(2, 10), tokens(1, 7, seed=1)]


def fitted(model, text, add=lambda sums: None):
    return dict(fitted_scales(model.model, anatomy(model), text, HERE, add))


def watched(model, names, text):
    """What the modules read and gave, [tokens, h] each, by name."""
    read, gave = {name: [] for name in names}, {name: [] for name in names}

    def keep(name, module, inputs, output):
        read[name].append(inputs[0].flatten(0, 1))
        gave[name].append(output.flatten(0, 1))

    hooks = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    with torch.no_grad():
        for ids in text:
            model(ids)
    for hook in hooks:
        hook.remove()
    return tuple({name: torch.cat(parts) for name, parts in seen.items()} for seen in (read, gave))


class Scale(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


def replace(model, name, scale):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Scale(scale))


def papers(model, name, x):
    """The paper's scale of one norm for inputs x [tokens, h], by its formula."""
    norm = model.get_submodule(name)
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    gain = norm.weight.detach() + anatomy(model).family.norm_offset
    return gain * (x.square().mean(-1) + epsilon).rsqrt().mean()


def squared_error(x, y, scale):
    return float((x * scale - y).square().sum())


def test_there_are_families_with_norms_on_both_sides():
    assert {"gemma2", "gemma3_text", "glm4"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_layer_by_layer_is_swapping_one_norm_after_another_in_the_whole_model(kind):
    model, whole, swapped = (tiny_model(kind) for _ in range(3))
    before = copy.deepcopy(model.state_dict())
    found = fitted(model, batches())
    assert list(found) == list(post_norm_modules(anatomy(model)))
    _, gave = watched(whole, found, batches())
    for name, scale in found.items():
        x, y = watched(swapped, [name], batches())[0][name], gave[name]
        torch.testing.assert_close(scale, (x * y).sum(0) / x.square().sum(0), rtol=1e-9, atol=1e-12)
        best = squared_error(x, y, scale)
        assert best <= squared_error(x, y, papers(whole, name, x)) * (1 + 1e-12)
        nudged = [squared_error(x, y, scale * (1 + nudge)) for nudge in (-1e-3, 1e-3)]
        assert best < min(nudged)
        replace(swapped, name, scale)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, whole(tokens()).logits)  # no hook, no scale is left in it


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_rms_is_constant_fitted_is_the_papers_and_the_model_itself(kind, tmp_path):
    """One token over and over: attention gives it the same at every place, so no norm sees two inputs."""
    model = tiny_model(kind)
    ids = torch.full((2, 9), 17)
    places, source = anatomy(model), tensors_of(model)
    sums = inverse_rms(model.model, post_norm_modules(places), [ids])
    means = {name: float(total / count) for name, (total, count) in sums.items()}
    scales = fitted(model, [ids])
    absorbed = dict(absorb_post_norms(places, source, means))
    for name, scale in scales.items():  # the norms of transformers compute in float32
        torch.testing.assert_close(scale, absorbed[f"{name}.weight"], rtol=1e-4, atol=1e-5)
    config = with_scales(config_of(model) | {"architectures": [type(model).__name__]}, places)
    write_checkpoint(tmp_path / "s", config, with_static_scales(places, source, scales), 1e9)
    student = load_model(tmp_path / "s", torch.float64, "eager")
    with torch.no_grad():
        # the norms of transformers compute in float32
        torch.testing.assert_close(student(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_of_inputs_of_one_rms_the_papers_scale_is_the_least_squares():
    x = torch.randn(50, 32, dtype=torch.float64)
    x = 3.0 * x / x.square().mean(-1, keepdim=True).sqrt()
    gain = torch.randn(32, dtype=torch.float64)
    y = gain * x / x.square().mean(-1, keepdim=True).sqrt()
    fit = least_squares_scale((x * y).sum(0), x.square().sum(0))
    torch.testing.assert_close(fit, gain / 3.0, rtol=1e-12, atol=0)


def test_a_channel_that_was_always_silent_keeps_a_scale_of_one():
    fit = least_squares_scale(torch.tensor([0.0, 6.0]), torch.tensor([0.0, 3.0]))
    assert fit.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_removed_is_a_scale_of_ones_and_nothing_else_changes(kind, tmp_path):
    model = tiny_model(kind)
    places, source = anatomy(model), tensors_of(model)
    config = with_scales(config_of(model) | {"architectures": [type(model).__name__]}, places)
    write_checkpoint(tmp_path / "s", config, with_static_scales(places, source, removed_scales(places)), 1e9)
    written = open_checkpoint(tmp_path / "s")
    gone = {f"{name}.weight" for name in post_norm_modules(places)}
    assert gone and gone < set(written)
    for name, tensor in written.items():
        assert torch.equal(tensor, torch.ones(32, dtype=torch.float64) if name in gone else source[name]), name
    for name in post_norm_modules(places):
        replace(model, name, 1.0)
    student = load_model(tmp_path / "s", torch.float64, "eager")
    with torch.no_grad():
        # Gemma's factor on embeddings was rounded to float32 in the one model and not in the other
        torch.testing.assert_close(student(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)


def fit_on_rank(ranks):
    scales = fitted(tiny_model("gemma3_text"), batches()[ranks.rank :: ranks.world], ranks.sum_)
    return {name: scale.tolist() for name, scale in scales.items()}


@pytest.mark.slow
def test_two_ranks_fit_what_one_fits(tmp_path):
    first, second = on_ranks(fit_on_rank, tmp_path, timeout=120.0)
    assert isinstance(first, dict) and first == second
    for name, scale in fitted(tiny_model("gemma3_text"), batches()).items():
        torch.testing.assert_close(torch.tensor(first[name], dtype=torch.float64), scale, rtol=1e-9, atol=1e-12)

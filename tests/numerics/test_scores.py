"""Every registered score: its name selects it, its contract holds, and another name is refused before any work."""

import pytest
import torch

from pipeline.distill.next_token import LanguageHead
from pipeline.graph import check
from pipeline.model.anatomy import anatomy_of
from pipeline.prune.importance import SCORES, score_named
from pipeline.prune.importance.measure import measure
from pipeline.prune.importance.moments import moments
from pipeline.prune.importance.score import PASSES, Measured, Score
from pipeline.prune.importance.taylor import gradients
from tests.tiny import config_of, tensors_of, tiny_model, tokens
from tests.tiny_text import configured


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_a_score_reads_only_what_it_needs_and_has_one_number_for_every_head_and_neuron(name, kind):
    model, source = tiny_model(kind), tensors_of(tiny_model(kind))
    anatomy, score = anatomy_of(config_of(model), source), SCORES[name]
    passes = {
        "moments": lambda: moments(model.model, anatomy, [tokens()]),
        "gradients": lambda: gradients(model, anatomy, [tokens()], LanguageHead(model, 64)),
    }
    assert set(passes) == set(PASSES)
    needed = {each: passes[each]() for each in score.needs}
    units = score.compute(anatomy, source, Measured(measure(model.model, anatomy, [tokens()]).scores(), **needed))
    for layer, sizes in enumerate(anatomy.sizes.layers):
        assert units.heads[layer].shape == (sizes.heads,) and units.neurons[layer].shape == (sizes.neurons,)
    values = torch.cat([*units.heads, *units.neurons])
    assert values.dtype is torch.float64 and bool(torch.isfinite(values).all()) and bool((values >= 0).all())


def test_a_name_that_is_not_registered_is_refused_with_the_choices():
    for refuse in (score_named, lambda name: check(configured(f"score.kind={name}"))):
        with pytest.raises(ValueError, match="score.kind.*activations") as fault:
            refuse("activations")
        assert all(name in str(fault.value) for name in SCORES)
    for name in SCORES:
        check(configured(f"score.kind={name}"))


def test_a_pass_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="needs: .*hessians"):
        Score(lambda *_: None, frozenset({"hessians"}))

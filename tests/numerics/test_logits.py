"""Logits from hidden states equal the class's own, for every family: nothing else may know what a head does."""

import pytest
import torch
import transformers

from pipeline.distill.distiller import Distiller, Objective
from pipeline.distill.next_token import LanguageHead, next_tokens
from pipeline.evaluation.divergence import divergence, final_states
from pipeline.evaluation.perplexity import tally
from pipeline.model.logits import LogitForm, logit_form, logits_of, shaped
from tests.tiny import BASE, CLASSES, tiny_model, tokens

SCALED = {  # classes that scale or cap their logits, in the table of families or not
    "gemma2": ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "granite": ("Granite", {"logits_scaling": 2.5}),
    "cohere": ("Cohere", {"logit_scale": 0.4}),
}


def scaled_model(name):
    family, special = SCALED[name]
    config = getattr(transformers, f"{family}Config")(**{**BASE, **special}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def models():
    yield from ((kind, lambda kind=kind: tiny_model(kind)) for kind in CLASSES)
    yield from ((name, lambda name=name: scaled_model(name)) for name in SCALED)


@pytest.fixture(params=list(models()), ids=lambda pair: pair[0])
def model(request):
    return request.param[1]()


@torch.no_grad()
def test_logits_of_hidden_states_are_the_class_s_own(model):
    ids = tokens(2, 9)
    torch.testing.assert_close(logits_of(model, model.base_model(ids).last_hidden_state), model(ids).logits)


def test_every_reader_uses_these_logits(model):
    """Perplexity, the next-token loss and its gradient, distillation and divergence: from the class's own logits."""
    ids = tokens(2, 9)
    own = model(ids).logits
    flat, labels = own[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(flat, labels)
    torch.testing.assert_close(tally(model, [ids], 5)[0] / len(labels), loss.detach())
    states = model.base_model(ids).last_hidden_state.detach()
    torch.testing.assert_close(LanguageHead(model, 5)(states, next_tokens(ids)), loss)
    other = states + 0.1
    p, q = (logits_of(model, each).detach().log_softmax(-1) for each in (other, states))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    total, count = divergence(model, ids, other.flatten(0, 1), 5)
    torch.testing.assert_close(total / count, kl)
    assert torch.equal(final_states(model, ids).view_as(states), states)
    objective = Objective("forward_kl", 0.5, 1.0, 1.0, 0.0, 0.0, 5, "autograd")
    head = Distiller(model, model, objective, None, False).train().head
    _, parts = head(states, other, next_tokens(ids))
    torch.testing.assert_close(parts["divergence"], kl)
    torch.testing.assert_close(parts["cross_entropy"], loss.detach())


def test_the_form_is_read_from_fields_and_null_changes_nothing():
    from types import SimpleNamespace as Fields

    fields = {"cohere": "logit_scale", "granite": "logits_scaling", "gemma2": "final_logit_softcapping"}
    for kind, field in fields.items():
        assert logit_form(Fields(model_type=kind, **{field: None})) == LogitForm()
    assert logit_form(Fields(model_type="granite", logits_scaling=4.0)) == LogitForm(0.25)
    assert logit_form(Fields(model_type="cohere", logit_scale=0.5)) == LogitForm(0.5)
    assert logit_form(Fields(model_type="gemma2", final_logit_softcapping=30.0)) == LogitForm(1.0, 30.0)
    product = torch.randn(3, dtype=torch.float64)
    assert shaped(product, LogitForm()) is product
    torch.testing.assert_close(shaped(product, LogitForm(2.0, 5.0)), 5.0 * torch.tanh(2.0 * product / 5.0))

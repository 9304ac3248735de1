"""Laws of the acceptance of drafts: one for the model itself, one minus the total variation for any other."""

import pytest
import torch

from pipeline.evaluation.drafting import accepted, figures
from tests.tiny import tiny_model, tokens


def share(reference, student, chunk=5):
    return torch.cat(list(accepted(reference, student, [tokens(2, 10), tokens(1, 7, seed=1)], chunk)))


def test_a_model_accepts_all_of_its_own_drafts():
    model = tiny_model("gemma2")
    torch.testing.assert_close(share(model, model), torch.tensor([10.0, 10.0, 7.0], dtype=torch.float64))


def test_acceptance_is_one_minus_the_total_variation_whatever_the_chunk():
    reference, student = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        p, q = (model(tokens(2, 10)).logits.softmax(-1) for model in (reference, student))
    wanted = (1.0 - (p - q).abs().sum(-1) / 2.0).sum(1)
    for chunk in (3, 100):
        torch.testing.assert_close(share(reference, student, chunk)[:2], wanted)


def test_tokens_per_pass_are_the_geometric_sum():
    found = figures(torch.tensor([0.7, 0.9], dtype=torch.float64))
    assert found["acceptance"] == pytest.approx(0.8) and found["acceptance_error"] == pytest.approx(0.1)
    assert found["tokens_per_pass"] == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert figures(torch.ones(1, dtype=torch.float64))["acceptance_error"] is None

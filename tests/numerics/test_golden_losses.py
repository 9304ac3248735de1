"""Losses of a tiny model over ten steps, stored as text: they change only on purpose.

The stored digits are those of one x86_64 CPU. Other CPUs add in another order: float32 sums differ by 2^-24 a term, and
ten steps of AdamW at this learning rate let that grow to less than 1e-4 of a loss, which is the tolerance. To change
them on purpose: python -m tests.numerics.test_golden_losses > tests/numerics/golden_losses.txt
"""

from pathlib import Path

import pytest
import torch

from pipeline.distill.distiller import Distiller, Match, Objective
from pipeline.distill.next_token import LanguageModel
from pipeline.distill.schedule import learning_rate
from tests.tiny import tiny_model, tokens

GOLDEN = Path(__file__).with_name("golden_losses.txt")
STEPS, TOLERANCE = 10, 1e-4
PLAIN = {"beta": 0.4, "temperature": 1.0, "cross_entropy": 0.0, "hidden": 0.0, "embedding": 0.0, "chunk": 7}
MATCH = Match(((0, 0), (1, 2), (2, 3)), tuple(range(0, 32, 2)))
NARROW = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 12}
OBJECTIVES = {
    "forward_kl": {"kind": "forward_kl"},
    "reverse_kl": {"kind": "reverse_kl", "temperature": 2.0},
    "jsd, cross entropy and hidden states": {"kind": "jsd", "cross_entropy": 0.3, "hidden": 0.5, "embedding": 0.2},
}
FAMILIES = ("llama-tied", "gemma2")


def losses(module: torch.nn.Module) -> list[float]:
    """Train on one batch with AdamW along the cosine schedule; return the loss before each step."""
    module.train()
    trained = [parameter for _, parameter in module.parameters_by_name()]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    curve, batch = [], tokens(4, 12)
    for step in range(STEPS):
        loss, _ = module(batch)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate("cosine", step, STEPS, 1e-2, 0.05, 0.01)
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


def curves() -> dict[str, list[float]]:
    """Return the curve of every objective and family, and of next-token training, by name."""
    found = {}
    for family in FAMILIES:
        for name, changed in OBJECTIVES.items():
            teacher = tiny_model(family, 0, torch.float32)
            student = tiny_model(family, 1, torch.float32, **NARROW)
            objective = Objective(**{**PLAIN, "kernel": "auto", **changed})
            found[f"{family}: {name}"] = losses(Distiller(teacher, student, objective, MATCH, False))
        model = tiny_model(family, 2, torch.float32, **NARROW)
        found[f"{family}: next token"] = losses(LanguageModel(model, 7, False))
    return found


def test_the_losses_are_those_that_were_stored():
    stored = {}
    for line in GOLDEN.read_text(encoding="utf-8").splitlines():
        name, _, values = line.rpartition(" = ")
        stored[name] = [float(value) for value in values.split()]
    found = curves()
    assert list(found) == list(stored)
    for name, curve in found.items():
        assert curve == pytest.approx(stored[name], rel=TOLERANCE), name
        assert curve[-1] < curve[0], "a curve that does not fall guards nothing"


if __name__ == "__main__":
    for name, curve in curves().items():
        print(f"{name} = {' '.join(f'{value:.8g}' for value in curve)}")

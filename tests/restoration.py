"""Least-squares problems and supernets that the tests of restoration, sequences and head norms share."""

import torch

from pipeline.model.anatomy import anatomy_of
from pipeline.prune.second_order.narrow import local_order
from pipeline.prune.second_order.sequential import prune_in_sequence
from pipeline.prune.second_order.supernet import candidate, expectation, removal_of
from tests.tiny import config_of, tensors_of, tokens

HERE = torch.device("cpu")


def problem(width=24, out=10, rows=200, seed=0):
    """A weight [out, width] and the Gram matrix of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draw, dtype=torch.float64) / width**0.5
    inputs = torch.randn(rows, width, generator=draw, dtype=torch.float64) @ (mixing + torch.eye(width))
    return torch.randn(out, width, generator=draw, dtype=torch.float64), inputs.T @ inputs


def output_error(weight, columns, moments, kept):
    """Return tr((W - W') H (W - W')ᵀ) for W' [out, in] that has these columns [out, kept] and zeros elsewhere."""
    gap = weight.to(torch.float64, copy=True)
    gap[:, torch.as_tensor(kept)] -= columns.to(gap)
    return float(((gap @ moments.to(torch.float64)) * gap).sum())


def anatomy(model):
    return anatomy_of(config_of(model), tensors_of(model))


def batches():
    return [tokens(2, 10), tokens(1, 7, seed=1)]


def supernet(model, counts, accumulation=True, text=None):
    """Candidates of every projection of a model, its weights left at their expectation."""
    stored = {}

    def prune(name, weight, moments):
        size = 16 if name.endswith("o_proj") else 1
        some = [count for count in counts if count <= 2] if size > 1 else [count for count in counts if count > 2]
        removal = local_order("obs", moments, weight, size, weight.shape[1] // size - min(some))
        stored[removal_of(name)] = removal.order

        def keep(count, columns):
            stored[candidate(name, count)] = columns

        passed = expectation(weight, moments, removal, some, keep)
        return passed if accumulation else weight

    dict(prune_in_sequence(model.model, anatomy(model), text or batches(), prune, HERE))
    return stored


def names_in(stored):
    return [name.removesuffix(".order") for name in stored if name.endswith(".order")]

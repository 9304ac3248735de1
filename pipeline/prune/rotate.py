"""The principal basis: the residual stream rotated as a whole, so that its first channels carry the most.

RMSNorm without gains commutes with rotation. Gains are folded into what reads the normalised stream, then one
orthogonal Q turns the whole stream (the global case of SliceGPT, 2401.15024, so the class stays the family's own):
x' = x Q, embeddings E Q, readers W diag(γ) Q, writers Qᵀ W, their biases Qᵀ b, all gains one. Channels 0 ... h'-1 are
then the principal cut, and SLNP's factor on gains of one is √(h / h'), which undoes the narrower norm.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.families import EMBEDDING, FINAL_NORM, HEAD, LAYER


def principal_basis(covariance: Tensor) -> Tensor:
    """Give the orthonormal eigenvectors [h, h] of a covariance as columns, largest eigenvalue first, in float64.

    Signs are fixed: the largest entry of each column is positive. ValueError if the covariance is not finite.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("the covariance of the residual stream is not finite; calibrate in a wider dtype")
    vectors = torch.linalg.eigh(covariance.to(torch.float64)).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def rotated_anatomy(anatomy: Anatomy) -> Anatomy:
    """Give the anatomy of the rotated view: the same with an output matrix of its own, as the final gain needs.

    Its config.json needs `tie_word_embeddings: false`.
    """
    return replace(anatomy, tied=False)


def rotate(anatomy: Anatomy, basis: Tensor, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give a lazy view of a checkpoint, of `rotated_anatomy`, with its stream turned by a basis [h, h].

    A tensor is computed in float64 when it is read and cast once to its own dtype. A factor √h on embeddings commutes.
    ValueError for a family with post-norms, whose gains do not commute, and for one without pre-norms.
    """
    return Rotated(anatomy, basis, source)


class Rotated(Mapping[str, Tensor]):
    """A checkpoint seen in another basis of its residual stream; nothing is kept."""

    def __init__(self, anatomy: Anatomy, basis: Tensor, source: Mapping[str, Tensor]):
        family = anatomy.family
        if family.post_norms:
            raise ValueError(
                f"model_type {family.model_type!r} has post-norms ({', '.join(family.post_norms)}), whose gains do not "
                "commute with a rotation; absorb and fold them first, or keep hidden channels as they are"
            )
        if not family.pre_norms:
            raise ValueError(f"model_type {family.model_type!r} has no pre-norms: its stream cannot be rotated")
        self.anatomy, self.source = anatomy, source
        self.basis = basis.to(torch.float64)
        self._names = rotated_anatomy(anatomy).shapes()
        self._norm_of = {
            f"{LAYER}{reader}": f"{LAYER}{norm}.weight"
            for norm, readers in family.pre_norms.items()
            for reader in readers
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.source[EMBEDDING if name == HEAD and self.anatomy.tied else name]
        return self._turned(name, stored.to(torch.float64)).to(stored.dtype)

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        if name == EMBEDDING:
            return tensor @ self.basis
        if name == HEAD:
            return (tensor * self._gain(FINAL_NORM)) @ self.basis
        layer, pattern = _place(name)
        if pattern in self.anatomy.norms:
            return torch.full_like(tensor, 1.0 - self.anatomy.family.norm_offset)
        module = pattern.rpartition(".")[0]
        (first, *rest), *_ = self.anatomy.layer_tensors[pattern]
        if rest == ["h"]:
            return (tensor * self._gain(self._norm_of[module].format(layer=layer))) @ self.basis
        if first == "h":
            return self.basis.T @ tensor
        return tensor

    def _gain(self, name: str) -> Tensor:
        return self.source[name].to(torch.float64) + self.anatomy.family.norm_offset


def _place(name: str) -> tuple[int | None, str]:
    """Give the layer of a tensor name and the name with a `{layer}` place; None and the name outside the layers."""
    start, _, end = LAYER.partition("{layer}")
    if not name.startswith(start):
        return None, name
    layer, _, rest = name.removeprefix(start).partition(end)
    return int(layer), LAYER + rest

"""The principal basis: the residual stream rotated as a whole, so that its first channels carry the most.

RMSNorm without gains commutes with rotation. Gains are folded into what reads the normalised stream, then one
orthogonal Q turns the whole stream (the global case of SliceGPT, 2401.15024, so the class stays the family's own):
x' = x Q, embeddings E Q, readers W diag(γ) Q, writers Qᵀ W, their biases Qᵀ b, all gains one. Channels 0 ... h'-1 are
then the principal cut, and SLNP's factor on gains of one is √(h / h'), which undoes the narrower norm.

The final gain does not commute, so folding it unties a tied output matrix. To keep the tie, channels whose final gain
stands out keep axes of their own (`tied_basis`), and one gain per new channel is fitted to the logits (`tied_gain`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy

UNSEEN = 0.1  # what a token that calibration never met counts in the fit of a tied gain
CHUNK = 8192  # rows of the embedding in float64 at once
RIDGE = 1e-9  # of the mean diagonal: draws the gain of a direction without energy to the median gain


def principal_basis(covariance: Tensor) -> Tensor:
    """Return the orthonormal eigenvectors [h, h] of a covariance as columns, largest eigenvalue first, in float64.

    Signs are fixed: the largest entry of each column is positive. ValueError if the covariance is not finite.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("the covariance of the residual stream is not finite; calibrate in a wider dtype")
    vectors = torch.linalg.eigh(covariance.to("cpu", torch.float64)).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def tied_basis(covariance: Tensor, gain: Tensor, axes: int) -> Tensor:
    """Return an orthonormal basis [h, h] in which an effective final gain [h] is nearly diagonal, most energy first.

    The `axes` channels whose gain lies farthest from the median keep axes of their own; the principal basis of the
    others mixes channels of nearly equal gains. `axes` = h is plain selection of channels by energy, `axes` = 0 the
    principal basis. ValueError if `axes` is out of range.
    """
    hidden = len(gain)
    if not 0 <= axes <= hidden:
        raise ValueError(f"{axes} axes of their own are requested; the residual stream has {hidden} channels")
    wide = covariance.to("cpu", torch.float64)
    far = (gain - gain.median()).abs().argsort(descending=True, stable=True)
    own, bulk = far[:axes].sort().values, far[axes:].sort().values
    basis = torch.zeros(hidden, hidden, dtype=torch.float64)
    basis[own, torch.arange(axes)] = 1.0
    if len(bulk):
        basis[bulk, axes:] = principal_basis(wide[bulk][:, bulk])
    energy = ((wide @ basis) * basis).sum(0)
    return basis[:, energy.argsort(descending=True, stable=True)]


def tied_gain(basis: Tensor, kept: int, gain: Tensor, embedding: Tensor, counts: Tensor, covariance: Tensor) -> Tensor:
    """Return the effective final gain g [h] of a tied model in a new basis [h, h] of which the first `kept` stay.

    Least squares over tokens t and stream directions u at the final norm, E Q_K diag(g) Q_Kᵀ u ≈ E diag(γ) u, for an
    effective gain γ [h], embedding E [v, h], token `counts` c [v], `covariance` S = Σ u uᵀ [h, h] of the final norm.
    Logits count up to a shift that all tokens share, so rows of E are centred. With M = Σ_t c_t (e_t - ē)(e_t - ē)ᵀ and
    the Hadamard product ⊙: (Q_KᵀMQ_K ⊙ Q_KᵀSQ_K) g = diag(Q_Kᵀ M diag(γ) S Q_K). Channels that go get the root mean
    square of g, so that SLNP's factor is √(h / h').
    """
    used = basis[:, :kept].to("cpu", torch.float64)
    spread, wide = covariance.to(used) / covariance.trace(), gain.to(used)
    tokens = _token_moments(embedding, counts).to(used)
    matrix = (used.T @ tokens @ used) * (used.T @ spread @ used)
    wanted = ((used.T @ tokens * wide) @ spread * used.T).sum(1)
    ridge = RIDGE * matrix.diagonal().mean()
    fitted = torch.linalg.solve(matrix + ridge * torch.eye(kept, dtype=matrix.dtype), wanted + ridge * wide.median())
    rest = fitted.square().mean().sqrt().expand(len(basis) - kept)
    return torch.cat([fitted, rest])


def _token_moments(embedding: Tensor, counts: Tensor) -> Tensor:
    """Return the covariance [h, h] of embedding rows under token counts [v], in float64."""
    shares = (counts.to("cpu", torch.float64) + UNSEEN) / (counts.sum() + UNSEEN * len(counts))
    mean = torch.zeros(embedding.shape[1], dtype=torch.float64)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows, share in zip(embedding.split(CHUNK), shares.split(CHUNK), strict=True):
        wide = rows.to("cpu", torch.float64)
        mean += share @ wide
        products += wide.T @ (share[:, None] * wide)
    return products - torch.outer(mean, mean)


def rotated_anatomy(anatomy: Anatomy) -> Anatomy:
    """Return the anatomy of the rotated view: the same with an output matrix of its own, as the final gain needs.

    Its config.json needs `tie_word_embeddings: false`.
    """
    return replace(anatomy, tied=False)


def rotate(anatomy: Anatomy, basis: Tensor, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a lazy view of a checkpoint, of `rotated_anatomy`, with its stream turned by a basis [h, h].

    A tensor is computed in float64 when it is read and cast once to its own dtype. A factor √h on embeddings commutes.
    ValueError for a family with post-norms, whose gains do not commute, and for one without pre-norms.
    """
    return Rotated(anatomy, basis, source, None)


def rotate_tied(anatomy: Anatomy, basis: Tensor, gain: Tensor, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a lazy view as `rotate` does, but of the same, tied anatomy: the final norm has the effective `gain` [h].

    ValueError as `rotate`, and for a model with an output matrix of its own, which `rotate` turns exactly.
    """
    if not anatomy.tied:
        raise ValueError("the output matrix is not tied to the embedding: rotate it exactly instead of fitting a gain")
    return Rotated(anatomy, basis, source, gain)


def check_rotatable(anatomy: Anatomy) -> None:
    """Raise ValueError for a family with post-norms, whose gains do not commute, and for one without pre-norms."""
    family = anatomy.family
    if family.post_norms:
        raise ValueError(
            f"model_type {family.model_type!r} has post-norms ({', '.join(family.post_norms)}), whose gains do not "
            "commute with a rotation; absorb and fold them first, or keep hidden channels as they are"
        )
    if family.experts:
        raise ValueError(
            f"model_type {family.model_type!r} has experts, which are not rotated; select channels by score"
        )
    if family.layer_norm:
        raise ValueError(
            f"model_type {family.model_type!r} has LayerNorm, which subtracts the mean of the channels and does not "
            "commute with a rotation; select hidden channels by score instead"
        )
    other = [
        name
        for name, segments in anatomy.layer_tensors.items()
        if segments == (("h",),) and name not in anatomy.norms and not name.endswith(".bias")
    ]
    if other:
        raise ValueError(f"model_type {family.model_type!r} multiplies channels by {other[0]}; select them by score")
    if not family.pre_norms:
        raise ValueError(f"model_type {family.model_type!r} has no pre-norms: its stream cannot be rotated")


class Rotated(Mapping[str, Tensor]):
    """A checkpoint seen in another basis of its residual stream; nothing is kept."""

    def __init__(self, anatomy: Anatomy, basis: Tensor, source: Mapping[str, Tensor], final: Tensor | None):
        check_rotatable(anatomy)
        self.anatomy, self.source = anatomy, source
        self.basis, self.final = basis.to(torch.float64), final  # final: effective gain of a tied view
        self._names = (rotated_anatomy(anatomy) if final is None else anatomy).shapes()
        self._norm_of = {
            f"{anatomy.family.prefix}{reader}": f"{anatomy.family.prefix}{norm}.weight"
            for norm, readers in anatomy.family.pre_norms.items()
            for reader in readers
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.source[self.anatomy.embedding if name == self.anatomy.head and self.anatomy.tied else name]
        return self._turned(name, stored.to(torch.float64)).to(stored.dtype)

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        if name == self.anatomy.embedding:
            return tensor @ self.basis
        if name == self.anatomy.head:
            return (tensor * self._gain(self.anatomy.final_norm)) @ self.basis
        if name == self.anatomy.final_norm and self.final is not None:
            return self.final.to(tensor) - self.anatomy.family.norm_offset
        layer, pattern = self._place(name)
        if pattern in self.anatomy.norms:
            return torch.full_like(tensor, 1.0 - self.anatomy.family.norm_offset)
        module = pattern.rpartition(".")[0]
        (first, *rest), *_ = self.anatomy.layer_tensors[pattern]
        if rest == ["h"]:
            return (tensor * self._gain(self._norm_of[module].format(layer=layer))) @ self.basis
        if first == "h":
            return self.basis.T @ tensor
        return tensor

    def _gain(self, name: str) -> Tensor | float:
        if self.anatomy.family.gainless:
            return 1.0
        return self.source[name].to(torch.float64) + self.anatomy.family.norm_offset

    def _place(self, name: str) -> tuple[int | None, str]:
        """Return the layer of a tensor and its name with a `{layer}` place; None and its name outside the layers."""
        prefix = self.anatomy.family.prefix
        start, _, end = prefix.partition("{layer}")
        if not name.startswith(start):
            return None, name
        layer, _, rest = name.removeprefix(start).partition(end)
        return int(layer), prefix + rest

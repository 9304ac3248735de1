"""Re-initialisation: kept weights are rescaled so that training starts from a stable network (Pangu Light,
2505.20155)."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.model.anatomy import Anatomy
from pipeline.model.blueprint import Blueprint
from pipeline.prune.surgery.cut import Donate, as_it_is

Stream = Iterable[tuple[str, Tensor]]


def stabilising_factor(kept: Tensor, original: Tensor) -> Tensor:
    """Return the SLNP factor c = |original| / |kept| of effective gains [h'] and [h] (Pangu Light, eq. 6)."""
    return original.norm() / kept.norm()


def stabilise_gains(
    anatomy: Anatomy,
    blueprint: Blueprint,
    source: Mapping[str, Tensor],
    stream: Stream,
    scales: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield a cut stream with every gain over hidden channels stabilised (SLNP), also where 1+w is stored.

    The factor is the source's: norm of the whole gain over norm of its kept channels. The biases of LayerNorm stay.
    The modules `scales` of the source are static scales (absorption), not norms, and stay as they are.
    """
    gains = _gain_factors(anatomy, blueprint, source)
    factors = {name: factor for name, origin, factor in gains if origin.removesuffix(".weight") not in scales}
    for name, tensor in stream:
        if name in factors:
            gain = _wide(tensor) + anatomy.family.norm_offset
            tensor = (gain * factors[name] - anatomy.family.norm_offset).to(tensor.dtype)
        yield name, tensor


def _gain_factors(
    anatomy: Anatomy, blueprint: Blueprint, source: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    channels, cut = torch.tensor(blueprint.channels), blueprint.student(anatomy)
    for pattern in anatomy.norms:
        places = (
            [(pattern, pattern)]
            if pattern == anatomy.final_norm
            else [
                (pattern.format(layer=place), pattern.format(layer=plan.host))
                for place, plan in enumerate(blueprint.layers)
                if cut.has(pattern, place)
            ]
        )
        for student, origin in places:
            gain = _wide(source[origin]) + anatomy.family.norm_offset
            yield student, origin, stabilising_factor(gain[channels], gain)


def compensate_gain(anatomy: Anatomy, source: Mapping[str, Tensor]) -> Donate:
    """Return a donation rule for `cut`: donated query, key and value rows are rescaled by donor gain / host gain.

    Donated rows then read the host's normalised input as they read their own layer's. ValueError if a host gain is
    zero, or if the norm has a bias.
    """
    norm, readers = next(iter(anatomy.family.pre_norms.items()), ("", ()))
    if f"{norm}.bias" in anatomy.optional:
        raise ValueError(f"reinit.gain_compensation: {norm} has a bias, which no factor compensates; set it to false")
    gain = f"{anatomy.family.prefix}{norm}.weight"
    if gain not in anatomy.norms:
        return as_it_is

    def donate(name: str, rows: Tensor, donor: int, host: int) -> Tensor:
        module, _, kind = name.removeprefix(anatomy.family.prefix).rpartition(".")
        if module not in readers or kind != "weight":
            return rows
        gains = [_wide(source[gain.format(layer=i)]) for i in (donor, host)]
        donor_gain, host_gain = (each + anatomy.family.norm_offset for each in gains)
        if (host_gain == 0).any():
            raise ValueError(f"reinit.gain_compensation: layer {host} has a gain of zero in {norm}; set it to false")
        ratio = donor_gain / host_gain
        columns = anatomy.layer_tensors[name][0].index("h") == 1
        return (_wide(rows) * (ratio if columns else ratio[:, None])).to(rows.dtype)

    return donate


def absorb_post_norms(
    anatomy: Anatomy, source: Mapping[str, Tensor], inverse_rms: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint with post-norm gains replaced by static scales s * gain (post-RMSNorm absorption).

    `inverse_rms` holds s, the mean over tokens of 1/rms(x), by post-norm module name.
    """
    gains = {module: _wide(source[f"{module}.weight"]) + anatomy.family.norm_offset for module in inverse_rms}
    return with_static_scales(anatomy, source, {module: gain * inverse_rms[module] for module, gain in gains.items()})


def with_static_scales(
    anatomy: Anatomy, source: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint with scales [h], by post-norm module name, in the place of post-norm gains.

    A scale keeps the norm's tensor name and holds the whole factor (not 1+w): the module at that place multiplies by
    it.
    """
    for name in anatomy.shapes():
        tensor = source[name]
        module = name.removesuffix(".weight")
        yield name, scales[module].to(tensor.device, tensor.dtype) if module in scales else tensor


def post_norm_modules(anatomy: Anatomy) -> dict[str, str]:
    """Return every post-norm module of the model with the projection it follows."""
    prefix = anatomy.family.prefix
    return {
        name: prefix.format(layer=layer) + anatomy.family.post_norms[name.removeprefix(prefix.format(layer=layer))]
        for layer in range(len(anatomy.sizes.layers))
        for name in anatomy.modules(anatomy.family.post_norms, layer)
    }


def fold_scales(anatomy: Anatomy, source: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint without post-norms: each static scale is multiplied into the rows (and bias) before it.

    W'[j, :] = scale[j] * W[j, :] for W_O and W_down [h, ...], in float32 or better, cast once.
    """
    scales = {projection: f"{norm}.weight" for norm, projection in post_norm_modules(anatomy).items()}
    removed = set(scales.values())
    for name in anatomy.shapes():
        if name in removed:
            continue
        tensor = source[name]
        module = name.rpartition(".")[0]
        if module in scales:
            scale = _wide(source[scales[module]])
            tensor = (_wide(tensor) * (scale[:, None] if tensor.ndim == 2 else scale)).to(tensor.dtype)
        yield name, tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""What a model does to `hidden @ weight.T` before it calls the result logits: the one place that knows.

The table of the family names the fields of `config.json`: `logits_scaling` divides in Granite and multiplies in
HyperCLOVA X, `logit_scale` multiplies in Cohere, `final_logit_softcapping` bounds with a tanh in Gemma 2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.model.families import family_of


@dataclass(frozen=True)
class LogitForm:
    """logits = softcap * tanh(scale * product / softcap), or scale * product where `softcap` is None."""

    scale: float = 1.0
    softcap: float | None = None


PLAIN = LogitForm()  # logits are the product itself


def logit_form(config: Any) -> LogitForm:
    """Return the form of a Hugging Face configuration; a field that is absent or null changes nothing.

    ValueError for a model type without a table.
    """
    family = family_of(config.model_type)
    scale, divisor, cap = (
        getattr(config, field or "", None) for field in (family.logit_scale, family.logit_divisor, family.logit_cap)
    )
    return LogitForm((scale or 1.0) / (divisor or 1.0), cap or None)


def shaped(product: Tensor, form: LogitForm) -> Tensor:
    """Return the logits [..., v] of products `hidden @ weight.T + bias` [..., v], in their type; differentiable."""
    logits = product if form.scale == 1.0 else product * form.scale
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)


def logits_of(model: Any, states: Tensor) -> Tensor:
    """Return the logits [..., v] of final hidden states [..., h] of a Hugging Face causal language model."""
    return shaped(model.get_output_embeddings()(states), logit_form(model.config))

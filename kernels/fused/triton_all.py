"""Every operation Triton implements, by its name in the table."""

from fused.triton_loss import kl_of_logits
from fused.triton_norm import add_rms_norm, rms_norm, static_scale
from fused.triton_pointwise import rotary, swiglu, swiglu_packed

__all__ = ["add_rms_norm", "kl_of_logits", "rms_norm", "rotary", "static_scale", "swiglu", "swiglu_packed"]

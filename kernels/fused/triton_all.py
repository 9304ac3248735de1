"""Every operation Triton implements, by its name in the table."""

from fused.triton_loss import kl_of_logits
from fused.triton_norm import rms_norm
from fused.triton_pointwise import rotary, swiglu, swiglu_packed

__all__ = ["kl_of_logits", "rms_norm", "rotary", "swiglu", "swiglu_packed"]

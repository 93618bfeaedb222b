"""filtering in Triton; each launcher takes the arguments of the native entry point of its name."""

from .bias_act import bias_act, bias_act_backward
from .gated_act import gated_act, gated_act_backward
from .upfirdn2d import upfirdn2d

__all__ = ["bias_act", "bias_act_backward", "gated_act", "gated_act_backward", "upfirdn2d"]

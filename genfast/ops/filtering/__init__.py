"""filtering: bias, noise and activation in one pass; gates; up- and down-sampling by a filter."""

from genfast.ops.filtering.bias_act import bias_act
from genfast.ops.filtering.gated_act import gated_act
from genfast.ops.filtering.resample import downsample2d, filter2d, setup_filter, upsample2d
from genfast.ops.filtering.upfirdn2d import upfirdn2d

__all__ = [
    "bias_act",
    "downsample2d",
    "filter2d",
    "gated_act",
    "setup_filter",
    "upfirdn2d",
    "upsample2d",
]

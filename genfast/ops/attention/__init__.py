"""attention: fused scaled dot product attention and its faces."""

from genfast.ops.attention.core import attention
from genfast.ops.attention.kvcache import attention_with_kvcache
from genfast.ops.attention.sdpa import scaled_dot_product_attention
from genfast.ops.attention.varlen import attention_varlen

__all__ = [
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "scaled_dot_product_attention",
]

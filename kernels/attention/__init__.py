"""attention in Triton; each launcher takes the arguments of the native entry point of its name."""

from .backward import attention_backward
from .cache import attention_append
from .forward import attention_cached, attention_forward

__all__ = ["attention_append", "attention_backward", "attention_cached", "attention_forward"]

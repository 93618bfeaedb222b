"""attn_implementation="genfast" for Hugging Face transformers (5 and later).

    import genfast.integrations.transformers as door
    door.register()
    model = AutoModel.from_pretrained(..., attn_implementation="genfast")

Masks are built by transformers' own sdpa mask builder (bool, or none where the model is plainly
causal or bidirectional). Grouped heads, softcap and attention sinks go to the kernel as they are:
keys and values are never repeated.
"""

from __future__ import annotations

import torch

from genfast.ops.attention import attention

NAME = "genfast"


def _with_bias(mask, bias):
    """One additive mask out of a mask (bool or float, or None) and a position bias."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def genfast_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux=None,
    position_bias=None,
    cache=None,
    **kwargs,
):
    """transformers' attention interface: query (B, Hq, L, D), key and value (B, Hkv, S, D).

    Returns ((B, L, Hq, D), None): like "sdpa" it has no attention weights to return.
    """
    if cache is not None and hasattr(cache, "update"):  # paged cache of continuous batching
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # Without a mask transformers means: causal from the top left, or one query that sees all.
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        attention_mask = attention_mask[..., : key.shape[2]]
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias)
    out = attention(
        query,
        key,
        value,
        mask=attention_mask,
        causal=causal,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes attn_implementation="genfast" known to transformers; calling it again is harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, genfast_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)

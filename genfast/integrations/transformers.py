"""attn_implementation="genfast" for Hugging Face transformers (5 and later).

    import genfast.integrations.transformers as door
    door.register()
    model = AutoModel.from_pretrained(..., attn_implementation="genfast")

Masks are built by transformers' own builders: its sdpa's (bool, or none where the model is plainly
causal or bidirectional), and for models that it does not run on "sdpa" (PegasusX, Git) its eager
one's, added to the scores. Grouped heads, softcap and attention sinks go to the kernel as they are:
keys and values are never repeated. A model that does not call transformers' attention interface
(Bloom, MPNet, TrOCR) raises ValueError at its first mask, one that looks its name up in a table of
its own (GPT-J, Sam) KeyError when it is made: transformers itself asks no name but its own, so a
few that build their masks themselves (XLNet, WavLM) run their own attention. Packed sequences are
told apart by `position_ids` with use_cache=False, as on "sdpa"; cu_seq_lens alone are not read.
"""

from __future__ import annotations

import functools
import sys
import warnings

import torch

from genfast.ops.attention import attention

NAME = "genfast"


def _both(a, b):
    """Two masks, bool (true = seen), added or None, as one."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype == torch.bool:
        return a & b if b.dtype == torch.bool else torch.where(a, b, -torch.inf)
    return torch.where(b, a, -torch.inf) if b.dtype == torch.bool else a + b


def _of_keys(indices, S: int):
    """Keys that an indexer chose (B, L, n) as a mask (B, 1, L, S)."""
    seen = torch.zeros(*indices.shape[:2], S, dtype=torch.bool, device=indices.device)
    return seen.scatter_(-1, indices.long(), True)[:, None]


def _of_blocks(module, indices, mask, query, S: int, positions):
    """The model's own mask of the blocks of keys that its indexer chose."""
    L = query.shape[2]
    if positions is None:
        positions = torch.arange(S - L, S, device=query.device)
    positions = positions.reshape(-1, L).expand(len(query), -1)
    return module.indexer.build_block_mask(indices, mask, S, query.dtype, query.device, positions)


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
    indices=None,
    block_indices=None,
    sinks=None,
    output_attentions: bool = False,
    **kwargs,
):
    """transformers' attention interface: query (B, Hq, L, D), key and value (B, Hkv, S, D).

    indices, block_indices: keys, or blocks of them, that a query's indexer chose; the others are
    hidden. Returns ((B, L, Hq, D), None): like "sdpa" it has no attention weights to return, and
    warns where they are asked for.
    """
    if output_attentions and not torch.compiler.is_compiling():
        warnings.warn(
            'output_attentions: "genfast" has no attention weights to return; load the model with '
            'attn_implementation="eager" for them',
            stacklevel=2,
        )
    if sinks is not None:
        raise ValueError(
            'sinks: expected one a head (s_aux), got one a query; use attn_implementation="eager"'
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if block_indices is not None:
        attention_mask = _of_blocks(
            module, block_indices, attention_mask, query, key.shape[2], kwargs.get("position_ids")
        )
    # Without a mask transformers means: causal from the top left, or one query that sees all.
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
        attention_mask = attention_mask[..., : key.shape[2]]
    attention_mask = _both(attention_mask, position_bias)
    if indices is not None:
        attention_mask = _both(attention_mask, _of_keys(indices, key.shape[2]))
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


# What transformers keeps from "sdpa" for softcap or sinks alone.
LIKE_SDPA = ("gemma2", "gpt_oss")


def _classes_of(config: type) -> tuple[list[type], bool]:
    """The model classes of a config, and whether it is a whole model's. Those of a part, and those
    whose name transformers does not export, are found where they are defined: beside the config."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        found = MODEL_MAPPING[config]
        return list(found) if isinstance(found, tuple) else [found], True
    except (KeyError, ValueError):
        beside = config.__module__.rpartition(".")[0] + ".modeling_"
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(beside)]
    found = [c for m in modules for c in vars(m).values() if isinstance(c, type)]
    models = [c for c in found if issubclass(c, PreTrainedModel) and c.config_class is config]
    return [c for c in models if c.__module__.startswith(beside)], False


@functools.cache
def _look_up(config: type) -> str | None:
    """Which masks the model class of a config wants: "sdpa", which leaves one out where causal from
    the top left or plainly bidirectional says it all; "whole", the same but always a mask, of a
    part of a model and of code that is not theirs; "eager". None: it does not call the interface.
    """
    known, whole = _classes_of(config)
    classes = [c for c in known if getattr(c, "_can_set_attn_implementation", bool)()]
    if not classes and (known or whole):
        return None
    if not whole:
        return "whole"
    if config.model_type in LIKE_SDPA or any(c._supports_sdpa for c in classes):
        return "sdpa"
    # Their modules do not say whether they are causal, or add the mask to scores of their own.
    return "eager"


def _builder(config: type) -> str | None:
    return _look_up(config)


_builder._dynamo_marked_constant = True  # a model's masks are built inside of its graph


def genfast_mask(*args, config=None, **kwargs):
    """The mask that a model with this config wants: transformers' sdpa's, or its eager one's."""
    from transformers import masking_utils

    builder = "whole" if config is None else _builder(type(config))
    if builder is None:
        raise ValueError(
            "attn_implementation: expected a model that calls transformers' attention "
            f"interface, got a {config.model_type}; load it with attn_implementation='eager'"
        )
    # Gemma 4 drops queries before layers of shared keys, and without a mask forgets where they
    # were; it refrains for "sdpa", by that name.
    if builder != "sdpa" or getattr(config, "num_kv_shared_layers", 0):
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    build = masking_utils.eager_mask if builder == "eager" else masking_utils.sdpa_mask
    return build(*args, config=config, **kwargs)


def register() -> None:
    """Makes attn_implementation="genfast" known to transformers; calling it again is harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, genfast_attention_forward)
    AttentionMaskInterface.register(NAME, genfast_mask)

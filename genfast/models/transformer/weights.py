"""The world's weights: state dicts of Hugging Face transformers -> ours, one key table per family.

A row of a table: our key, their keys, how they become one tensor. "{i}" runs over the layers. Every
tensor of theirs must be named by a row or in `unused`, and every one of ours must be found.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast._extras import need
from genfast.models.transformer.decoder import GPT
from genfast.models.transformer.encoder import BERT
from genfast.models.transformer.seq2seq import T5
from genfast.models.transformer.vit import ViT


class BadWeights(ValueError):
    """Keys or shapes do not fit; the message names them."""


# ---- how tensors become one ---------------------------------------------------------------------


def stacked(*parts: Tensor) -> Tensor:
    """Rows of several linear layers as one: q over k over v; gate over up."""
    return torch.cat(parts)


def transposed(w: Tensor) -> Tensor:
    """GPT-2 stores (in, out)."""
    return w.mT.contiguous()


def flattened(w: Tensor) -> Tensor:
    """A convolution of stride = kernel as a linear layer: (d, C, P, P) -> (d, C P P)."""
    return w.flatten(1)


def squeezed(w: Tensor) -> Tensor:
    return w.squeeze(0)


def interleaved(head_dim: int) -> Callable[..., Tensor]:
    """Stacks q, k, v; in q and k, rotary pairs (r, r + D / 2) become (2r, 2r + 1) as ours are."""

    def turn(w: Tensor) -> Tensor:
        return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)

    return lambda q, k, v: torch.cat([turn(q), turn(k), v])


# ---- tables -------------------------------------------------------------------------------------


class Row(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    join: Callable[..., Tensor] = stacked


def rows(ours: str, *theirs: str, join=stacked, parts=("weight", "bias")) -> list[Row]:
    """A row for the weight and one for the bias."""
    return [Row(f"{ours}.{p}", tuple(f"{t}.{p}" for t in theirs), join) for p in parts]


WEIGHT = ("weight",)


@dataclass(frozen=True)
class Family:
    """model: ours. config: their config (a dict) -> our constructor's arguments. keys: our
    arguments -> rows. prefix: may stand before their keys. older: (old, new) spellings in keys of
    files. unused: beginnings of keys that hold nothing of ours, or a copy.
    """

    model: type[nn.Module]
    config: Callable[[dict], dict]
    keys: Callable[[dict], list[Row]]
    prefix: str
    older: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()


def _number(c: dict, ours: str, theirs: str) -> Any:
    """A setting that is a size (a positive int), an index, or a small float; None as a default."""
    value, kind = c[theirs], float if ours in ("eps", "rotary_base") else int
    if value is None and ours in ("hidden", "kv_heads", "decoder_layers"):
        return None
    least = 0 if ours in ("pad", "eos", "types") else 1 if kind is int else 1e-30
    if type(value) not in (kind, int) or not least <= value < math.inf:
        raise BadWeights(f"{theirs}: expected a finite {kind.__name__} >= {least}, got {value!r}")
    return kind(value)


def _named(table: dict[str, str]) -> Callable[[dict], dict]:
    return lambda c: {ours: _number(c, ours, theirs) for ours, theirs in table.items()}


_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"
}  # fmt: skip


def _activation(c: dict, key: str, **more: str) -> str:
    known = _ACTIVATIONS | more
    if not isinstance(c[key], str) or c[key] not in known:
        raise BadWeights(f"{key}: expected one of {', '.join(known)}, got {c[key]!r}")
    return known[c[key]]


def _only(c: dict, **expected: Any) -> None:
    """Settings of theirs that ours have no counterpart of."""
    for key, value in expected.items():
        if c.get(key, value) != value:
            raise BadWeights(f"{key}: this architecture needs {value!r}, got {c[key]!r}")


def _gpt2_config(c: dict) -> dict:
    _only(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
          add_cross_attention=False)  # fmt: skip
    names = {"vocab": "vocab_size", "d": "n_embd", "layers": "n_layer", "heads": "n_head",
             "context": "n_positions", "hidden": "n_inner",
             "eps": "layer_norm_epsilon"}  # fmt: skip
    return _named(names)(c) | {
        "positions": "learned", "norm": "layer", "bias": True,
        "activation": _activation(c, "activation_function"),
        "tied": c.get("tie_word_embeddings", True),
    }  # fmt: skip


def _gpt2_keys(c: dict) -> list[Row]:
    b, h = "blocks.{i}", "h.{i}"
    return [
        *rows("embed", "wte", parts=WEIGHT),
        *rows("positions", "wpe", parts=WEIGHT),
        *rows(f"{b}.norm1", f"{h}.ln_1"),
        *rows(f"{b}.attention.qkv", f"{h}.attn.c_attn", join=transposed, parts=WEIGHT),
        *rows(f"{b}.attention.qkv", f"{h}.attn.c_attn", parts=("bias",)),
        *rows(f"{b}.attention.out", f"{h}.attn.c_proj", join=transposed, parts=WEIGHT),
        *rows(f"{b}.attention.out", f"{h}.attn.c_proj", parts=("bias",)),
        *rows(f"{b}.norm2", f"{h}.ln_2"),
        *rows(f"{b}.feed_forward.up", f"{h}.mlp.c_fc", join=transposed, parts=WEIGHT),
        *rows(f"{b}.feed_forward.up", f"{h}.mlp.c_fc", parts=("bias",)),
        *rows(f"{b}.feed_forward.down", f"{h}.mlp.c_proj", join=transposed, parts=WEIGHT),
        *rows(f"{b}.feed_forward.down", f"{h}.mlp.c_proj", parts=("bias",)),
        *rows("norm", "ln_f"),
        *([] if c["tied"] else rows("head", "lm_head", parts=WEIGHT)),
    ]


def _llama_config(c: dict) -> dict:
    rope = c.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadWeights(f"rope_parameters: expected a table, got {rope!r}")
    _only(c, hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)
    _only(rope, rope_type="default")
    names = {"vocab": "vocab_size", "d": "hidden_size", "layers": "num_hidden_layers",
             "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
             "context": "max_position_embeddings", "hidden": "intermediate_size",
             "eps": "rms_norm_eps"}  # fmt: skip
    if c["num_key_value_heads"] is None:
        c = c | {"num_key_value_heads": c["num_attention_heads"]}
    found = _named(names)(c)
    if c.get("head_dim") is not None:
        _only(c, head_dim=found["d"] // found["heads"])
    base = {"rope_theta": c.get("rope_theta", 10000.0)} | rope
    return found | {
        "positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False,
        "tied": c.get("tie_word_embeddings", False),
        "rotary_base": _number(base, "rotary_base", "rope_theta"),
    }  # fmt: skip


def _llama_keys(c: dict) -> list[Row]:
    b, h = "blocks.{i}", "layers.{i}"
    qkv = [f"{h}.self_attn.{x}_proj" for x in "qkv"]
    gated = [f"{h}.mlp.{x}_proj" for x in ("gate", "up")]
    pairs = interleaved(c["d"] // c["heads"])
    return [
        *rows("embed", "embed_tokens", parts=WEIGHT),
        *rows(f"{b}.norm1", f"{h}.input_layernorm", parts=WEIGHT),
        *rows(f"{b}.attention.qkv", *qkv, join=pairs, parts=WEIGHT),
        *rows(f"{b}.attention.out", f"{h}.self_attn.o_proj", parts=WEIGHT),
        *rows(f"{b}.norm2", f"{h}.post_attention_layernorm", parts=WEIGHT),
        *rows(f"{b}.feed_forward.up", *gated, parts=WEIGHT),
        *rows(f"{b}.feed_forward.down", f"{h}.mlp.down_proj", parts=WEIGHT),
        *rows("norm", "norm", parts=WEIGHT),
        *([] if c["tied"] else rows("head", "lm_head", parts=WEIGHT)),
    ]


def _bert_config(c: dict) -> dict:
    _only(c, is_decoder=False)
    names = {"vocab": "vocab_size", "d": "hidden_size", "layers": "num_hidden_layers",
             "heads": "num_attention_heads", "hidden": "intermediate_size",
             "context": "max_position_embeddings", "types": "type_vocab_size",
             "eps": "layer_norm_eps"}  # fmt: skip
    return _named(names)(c) | {"activation": _activation(c, "hidden_act")}


def _bert_keys(c: dict) -> list[Row]:
    b, h, e = "blocks.{i}", "encoder.layer.{i}", "embeddings"
    qkv = [f"{h}.attention.self.{x}" for x in ("query", "key", "value")]
    head = "cls.predictions"
    return [
        *rows("embed", f"{e}.word_embeddings", parts=WEIGHT),
        *rows("positions", f"{e}.position_embeddings", parts=WEIGHT),
        *rows("segments", f"{e}.token_type_embeddings", parts=WEIGHT),
        *rows("norm", f"{e}.LayerNorm"),
        *rows(f"{b}.attention.qkv", *qkv),
        *rows(f"{b}.attention.out", f"{h}.attention.output.dense"),
        *rows(f"{b}.norm1", f"{h}.attention.output.LayerNorm"),
        *rows(f"{b}.feed_forward.up", f"{h}.intermediate.dense"),
        *rows(f"{b}.feed_forward.down", f"{h}.output.dense"),
        *rows(f"{b}.norm2", f"{h}.output.LayerNorm"),
        *(rows("pooler", "pooler.dense") if c["pooler"] else []),
        *(
            [
                *rows("head", f"{head}.transform.dense"),
                *rows("head_norm", f"{head}.transform.LayerNorm"),
                Row("head_bias", (f"{head}.bias",)),
            ]
            if c["mlm"]
            else []
        ),
    ]


def _t5_config(c: dict) -> dict:
    names = {"vocab": "vocab_size", "d": "d_model", "layers": "num_layers", "heads": "num_heads",
             "decoder_layers": "num_decoder_layers", "head_dim": "d_kv", "hidden": "d_ff",
             "buckets": "relative_attention_num_buckets", "pad": "pad_token_id",
             "longest": "relative_attention_max_distance", "eps": "layer_norm_epsilon",
             "eos": "eos_token_id"}  # fmt: skip
    tied = c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True))
    _only(c, decoder_start_token_id=c["pad_token_id"])
    activation = _activation(c, "feed_forward_proj", **{"gated-gelu": "geglu"})
    # What they compute is `dense_act_fn`, which a config may set apart.
    gated, fn = activation == "geglu", c["feed_forward_proj"]
    _only(c, dense_act_fn="gelu_new" if gated else fn, is_gated_act=gated)
    return _named(names)(c) | {"tied": tied, "activation": activation}


def _t5_keys(c: dict) -> list[Row]:
    def stack(side: str, feed: int) -> list[Row]:
        b, h = f"{side}.{{i}}", f"{side}.block.{{i}}.layer"
        ff = f"{h}.{feed}.DenseReluDense"
        up = [f"{ff}.wi_0", f"{ff}.wi_1"] if c["activation"] == "geglu" else [f"{ff}.wi"]
        own = f"{h}.0.SelfAttention"
        return [
            *rows(f"{b}.norm1", f"{h}.0.layer_norm", parts=WEIGHT),
            *rows(f"{b}.attention.qkv", *(f"{own}.{x}" for x in "qkv"), parts=WEIGHT),
            *rows(f"{b}.attention.out", f"{own}.o", parts=WEIGHT),
            *rows(f"{b}.norm{feed + 1}", f"{h}.{feed}.layer_norm", parts=WEIGHT),
            *rows(f"{b}.feed_forward.up", *up, parts=WEIGHT),
            *rows(f"{b}.feed_forward.down", f"{ff}.wo", parts=WEIGHT),
            *rows(f"{side}_norm", f"{side}.final_layer_norm", parts=WEIGHT),
            *rows(
                f"{side}_bias.table",
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
                parts=WEIGHT,
            ),
        ]

    b, h = "decoder.{i}", "decoder.block.{i}.layer.1"
    across = f"{h}.EncDecAttention"
    return [
        *rows("embed", "shared", parts=WEIGHT),
        *stack("encoder", 1),
        *stack("decoder", 2),
        *rows(f"{b}.norm2", f"{h}.layer_norm", parts=WEIGHT),
        *rows(f"{b}.cross.q", f"{across}.q", parts=WEIGHT),
        *rows(f"{b}.cross.kv", f"{across}.k", f"{across}.v", parts=WEIGHT),
        *rows(f"{b}.cross.out", f"{across}.o", parts=WEIGHT),
        *([] if c["tied"] else rows("head", "lm_head", parts=WEIGHT)),
    ]


def _side(c: dict, key: str) -> Any:
    """Of a square, which they also give as a pair."""
    value = c[key]
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and value[0] == value[1]
    return value[0] if pair else value


def _vit_config(c: dict) -> dict:
    _only(c, qkv_bias=True)
    c = c | {key: _side(c, key) for key in ("image_size", "patch_size")}
    names = {"image": "image_size", "patch": "patch_size", "channels": "num_channels",
             "d": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
             "hidden": "intermediate_size", "eps": "layer_norm_eps"}  # fmt: skip
    classes = len(c["id2label"]) if c.get("id2label") else c.get("num_labels", 2)
    return _named(names)(c) | {"classes": classes, "activation": _activation(c, "hidden_act")}


def _vit_keys(c: dict) -> list[Row]:
    b, h, e = "blocks.{i}", "layers.{i}", "embeddings"
    return [
        Row("first", (f"{e}.cls_token",), squeezed),
        Row("positions", (f"{e}.position_embeddings",), squeezed),
        *rows("embed", f"{e}.patch_embeddings.projection", join=flattened, parts=WEIGHT),
        *rows("embed", f"{e}.patch_embeddings.projection", parts=("bias",)),
        *rows(f"{b}.norm1", f"{h}.layernorm_before"),
        *rows(f"{b}.attention.qkv", *(f"{h}.attention.{x}_proj" for x in "qkv")),
        *rows(f"{b}.attention.out", f"{h}.attention.o_proj"),
        *rows(f"{b}.norm2", f"{h}.layernorm_after"),
        *rows(f"{b}.feed_forward.up", f"{h}.mlp.fc1"),
        *rows(f"{b}.feed_forward.down", f"{h}.mlp.fc2"),
        *rows("norm", "layernorm"),
        *rows("head", "classifier"),
    ]


# Their `model_type` -> family.
FAMILIES = {
    "gpt2": Family(
        GPT, _gpt2_config, _gpt2_keys, "transformer.", unused=("lm_head.",),
        older=((".attn.masked_bias", ".unused"), (".attn.bias", ".unused")),
    ),
    "llama": Family(
        GPT, _llama_config, _llama_keys, "model.", unused=("lm_head.",),
        older=((".self_attn.rotary_emb.inv_freq", ".unused"),),
    ),
    "bert": Family(
        BERT, _bert_config, _bert_keys, "bert.",
        older=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
        unused=("embeddings.position_ids", "pooler.", "cls."),
    ),
    "t5": Family(
        T5, _t5_config, _t5_keys, "",
        unused=("encoder.embed_tokens.", "decoder.embed_tokens.", "lm_head.",
                "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias."),
    ),
    "vit": Family(
        ViT, _vit_config, _vit_keys, "vit.", unused=("pooler.",),
        # Files written before transformers 5.
        older=(
            ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ),
    ),
}  # fmt: skip


# ---- loading ------------------------------------------------------------------------------------


def _family(config: dict) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BadWeights(f"model_type: expected one of {', '.join(FAMILIES)}, got {kind!r}")
    return FAMILIES[kind]


def _spelled(family: Family, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix, in today's spelling."""
    found = {}
    for key, value in state.items():
        key = key.removeprefix(family.prefix)
        for old, new in family.older:
            key = key.replace(old, new)
        found[key] = value
    return found


def _expanded(table: list[Row], ours: dict[str, Tensor]) -> Iterator[Row]:
    """The rows with {i} replaced by every layer that our model has."""
    for row in table:
        i = 0
        while (key := row.ours.replace("{i}", str(i))) in ours:
            yield Row(key, tuple(t.replace("{i}", str(i)) for t in row.theirs), row.join)
            if key == row.ours:
                break
            i += 1


def converted(config: dict, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Our model (fresh) and the state dict for it. config: of transformers, as a dict."""
    family = _family(config)
    theirs = _spelled(family, state)
    arguments = family.config(config)
    if family.model is BERT:  # the heads are no part of their configuration
        arguments["mlm"] = any(k.startswith("cls.predictions.") for k in theirs)
        arguments["pooler"] = any(k.startswith("pooler.") for k in theirs)
        if arguments["mlm"]:
            _only(config, tie_word_embeddings=True)  # the head is the embedding
    model = family.model(**arguments)
    ours, found, used = model.state_dict(), {}, set()
    for row in _expanded(family.keys(model.config), ours):
        missing = [t for t in row.theirs if t not in theirs]
        if missing:
            continue
        used.update(row.theirs)
        found[row.ours] = row.join(*(theirs[t] for t in row.theirs))
    unknown = [k for k in theirs if k not in used and ".unused" not in k
               and not k.startswith(family.unused)]  # fmt: skip
    _refuse(config, ours, found, unknown)
    return model, found


def _refuse(config, ours, found, unknown) -> None:
    problems = []
    if missing := [k for k in ours if k not in found]:
        problems.append(f"nothing was found for {', '.join(missing)}")
    if unknown:
        problems.append(f"unknown keys: {', '.join(unknown)}")
    wrong = [
        f"{k}: expected {tuple(ours[k].shape)}, got {tuple(x.shape)}"
        for k, x in found.items()
        if x.shape != ours[k].shape
    ]
    if wrong:
        problems.append("wrong shapes: " + "; ".join(wrong))
    if problems:
        raise BadWeights(f"weights of {config['model_type']}: {'. '.join(problems)}")


def from_transformers(source, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Our model, in eval mode, with the weights of a transformers model or a folder of one.

    source: a transformers model of GPT-2, Llama, BERT (MiniLM), T5 or ViT, or the path of a folder
    with config.json and model.safetensors, read without transformers. The weights are copied.
    Raises BadWeights naming missing and unknown keys and files that cannot be read, TypeError,
    FileNotFoundError.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if isinstance(source, (str, os.PathLike)):
        config, state = _read(Path(source))
    elif isinstance(source, nn.Module) and hasattr(getattr(source, "config", None), "to_dict"):
        config, state = source.config.to_dict(), source.state_dict()
        if any(x.is_meta for x in state.values()):
            raise BadWeights(
                "source: expected a model with weights, got one on meta; load it first"
            )
    else:
        raise TypeError(
            f"source: expected a transformers model or the path of a folder of one, got "
            f"{type(source).__name__}"
        )
    try:
        model, found = converted(config, state)
    except KeyError as error:
        raise BadWeights(
            f"config: expected the key {error} of a {config.get('model_type')}, got none"
        ) from None
    model.load_state_dict(found)
    return model.to(dtype).eval()


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    need("safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected a folder that holds {name}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
    except (ValueError, SafetensorError) as error:
        raise BadWeights(
            f"{folder}: expected a readable config.json and model.safetensors ({error})"
        ) from None
    if not isinstance(config, dict):
        raise BadWeights(f"{folder}: config.json: expected a table, got {type(config).__name__}")
    config = _DEFAULTS.get(config.get("model_type"), {}) | config
    if config.get("model_type") == "t5" and config.get("tie_word_embeddings", True):
        # transformers 5 ties the output of every T5 and writes it once, also where it is unscaled.
        if "lm_head.weight" not in state and "shared.weight" in state:
            state["lm_head.weight"] = state["shared.weight"]
    return config, state


# What config.json may leave out because it is transformers' default.
_DEFAULTS = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    "llama": {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "bert": {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    "t5": {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
           "feed_forward_proj": "relu", "pad_token_id": 0, "eos_token_id": 1},
    "vit": {"num_channels": 3, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
}  # fmt: skip

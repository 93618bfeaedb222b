"""torch.nn.MultiheadAttention by genfast's kernels: same parameters, state dict and behaviour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.ops.attention import attention
from genfast.ops.linear import linear

_INF = float("-inf")


def _hidden(mask: Tensor | None, name: str) -> Tensor | None:
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected a bool or floating point mask, got {mask.dtype}")
    return mask


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, _INF)


def _together(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Two masks of this module's convention (bool: true = hidden; float: added), broadcast."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype == b.dtype == torch.bool:
        return a | b
    return _as_bias(a, dtype) + _as_bias(b, dtype)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) as a tensor (B, H, L, S); a row that sees nothing is 0, never NaN.

    mask: bool (true = attend) or added.
    """
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is None:
        return s.softmax(-1)
    s = s + mask if mask.dtype != torch.bool else s.masked_fill(~mask, _INF)
    empty = (s.detach() == _INF).all(-1, keepdim=True)
    # Zeros before the softmax keep NaN out of its backward.
    return s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention: constructor, parameters and forward are its own.

    Differences, all to the good: rows whose keys are all masked give 0 with zero gradients instead
    of NaN; is_causal works without attn_mask too; training and dropout run fused; a float attn_mask
    gets its gradient without an (L, S) tensor per head. need_weights=True returns the weights and
    costs what it costs in PyTorch. Nested tensors go to PyTorch's own path.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (L, N, E), key (S, N, kdim), value (S, N, vdim); batch first or unbatched as set.

        Masks as in PyTorch: bool true = hidden, float = added; key_padding_mask (N, S), attn_mask
        (L, S) or (N * heads, L, S). Returns (output, weights or None).
        """
        # The first: as in `Linear`.
        if not isinstance(self, MultiheadAttention) or (
            query.is_nested or key.is_nested or value.is_nested
        ):
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        sequence = 1 if self.batch_first and batched else 0
        if batched and key.shape[1 - sequence] != query.shape[1 - sequence]:
            raise ValueError(
                f"key: expected query's batch of {query.shape[1 - sequence]}, got shape "
                f"{tuple(key.shape)}; expand it"
            )
        if not batched:
            query, key, value = (
                (x := query.unsqueeze(1)),
                x if key is query else key.unsqueeze(1),
                x if value is query else value.unsqueeze(1),
            )
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value, sequence)
        mask, causal = self._mask(q, k, key_padding_mask, attn_mask, is_causal, need_weights)
        k, v, mask = self._extend(k, v, mask)
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            if causal:
                seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
                mask = seen if mask is None else mask.where(seen, mask.new_tensor(
                    False if mask.dtype == torch.bool else _INF))  # fmt: skip
            weights = attention_weights(q, k, mask)
            if p > 0:
                weights = F.dropout(weights, p)
            out = weights @ v
        else:
            out = attention(q, k, v, mask=mask, causal=causal, dropout_p=p)
        # (B, H, L, D) -> (L, B, E) or (B, L, E): q's order in memory makes it a view.
        out = out.permute(2, 0, 1, 3) if sequence == 0 else out.transpose(1, 2)
        out = self.out_proj(out.flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out = out.squeeze(1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(self, query, key, value, sequence):
        """q, k, v (B, H, S, head_dim), views of the projections."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query.shape[-1] != self.embed_dim or key.shape != value.shape:
                raise ValueError(
                    f"query, key, value: expected embeddings of {self.embed_dim} and value's shape "
                    f"equal to key's, got {tuple(query.shape)}, {tuple(key.shape)}, "
                    f"{tuple(value.shape)}"
                )
            if query is key and key is value:
                parts = linear(query, self.in_proj_weight, bias).chunk(3, -1)
            elif key is value:
                E = self.embed_dim
                wq, wkv = self.in_proj_weight.split([E, 2 * E])
                bq, bkv = (None, None) if bias is None else bias.split([E, 2 * E])
                parts = linear(query, wq, bq), *linear(key, wkv, bkv).chunk(2, -1)
            else:
                weights = self.in_proj_weight.chunk(3)
                biases = (None,) * 3 if bias is None else bias.chunk(3)
                parts = map(linear, (query, key, value), weights, biases)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            parts = map(linear, (query, key, value), weights, biases)
        heads = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in parts)
        if sequence == 1:
            return tuple(x.transpose(1, 2) for x in heads)
        return tuple(x.permute(1, 2, 0, 3) for x in heads)

    def _mask(self, q, k, key_padding_mask, attn_mask, is_causal, need_weights):
        """(mask in this module's convention, (B|1, H|1, L|1, S), or None; causal)."""
        B, H, L, _ = q.shape
        S = k.shape[2]
        padding = _hidden(key_padding_mask, "key_padding_mask")
        hidden = _hidden(attn_mask, "attn_mask")
        # With a mask beside it is_causal is a hint that the mask is the causal one; rows behind the
        # keys are seen through a mask alone, which torch keeps where there is padding.
        extended = self.bias_k is not None or self.add_zero_attn
        kept = need_weights or (extended and padding is not None)
        causal = is_causal and (hidden is None or not kept)
        if causal:
            hidden = None
        if hidden is not None:
            expected = (L, S) if hidden.dim() == 2 else (B * H, L, S)
            if tuple(hidden.shape) != expected:
                raise ValueError(
                    f"attn_mask: expected shape {(L, S)} or {(B * H, L, S)}, "
                    f"got {tuple(hidden.shape)}"
                )
            hidden = hidden[None, None] if hidden.dim() == 2 else hidden.unflatten(0, (B, H))
        if padding is not None:
            if tuple(padding.shape) != (B, S):
                raise ValueError(
                    f"key_padding_mask: expected shape {(B, S)}, got {tuple(padding.shape)}"
                )
            padding = padding[:, None, None]
        mask = _together(hidden, padding, q.dtype)
        if mask is not None and mask.dtype not in (torch.bool, q.dtype):
            mask = mask.to(q.dtype)
        return mask, causal

    def _extend(self, k, v, mask):
        """The learned key/value row and the row of zeros behind the others; both are visible."""
        B, H, _, D = k.shape
        rows = []
        if self.bias_k is not None:
            rows.append(tuple(
                x.to(k.dtype).reshape(1, H, 1, D).expand(B, -1, -1, -1)
                for x in (self.bias_k, self.bias_v)
            ))  # fmt: skip
        if self.add_zero_attn:
            rows.append((k.new_zeros(B, H, 1, D),) * 2)
        for new_k, new_v in rows:
            k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

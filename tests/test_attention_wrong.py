"""attention, its faces and its caches: wrong input is named, whichever road the call would take."""

import math

import pytest
import torch

import genfast

R = torch.randn
q4, k4 = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
qg = torch.zeros(2, 4, 5, 8, requires_grad=True)
i32 = torch.tensor([0, 3, 5], dtype=torch.int32)
WRAPS = torch.tensor([0, 2**31 - 1, -2, 0, 5], dtype=torch.int32)  # differences beyond int32
q3 = torch.zeros(5, 2, 8)
c4 = torch.zeros(2, 2, 16, 8)
n2 = torch.tensor([3, 15], dtype=torch.int32)
A, V, C = genfast.attention, genfast.attention_varlen, genfast.attention_with_kvcache
S = genfast.scaled_dot_product_attention
WRONG = {
    "list": (lambda: A([1.0], k4, k4), TypeError, "q: expected a torch.Tensor"),
    "int": (lambda: A(q4.int(), k4.int(), k4.int()), TypeError, "q: expected dtype"),
    "3-D": (lambda: A(q4[0], k4, k4), ValueError, "q: expected shape"),
    "mixed": (lambda: A(q4, k4.half(), k4), TypeError, "k: expected the dtype of q"),
    "heads": (lambda: A(q4[:, :3], k4, k4), ValueError, "q: expected its heads"),
    "D": (lambda: A(q4[..., :4], k4, k4), ValueError, "k: expected .* D = 4"),
    "Sk": (lambda: A(q4, k4, k4[:, :, :3]), ValueError, "v: expected .* Sk = 7"),
    "B": (lambda: A(q4, k4[:1], k4[:1]), ValueError, "k: expected .* B = 2"),
    "mask": (lambda: A(q4, k4, k4, mask=torch.ones(3, 7)), ValueError, "mask: expected"),
    "int mask": (lambda: A(q4, k4, k4, mask=torch.ones(5, 7).int()), TypeError, "mask: expected"),
    "slopes": (lambda: A(q4, k4, k4, alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes"),
    "sinks": (lambda: A(q4, k4, k4, sinks=torch.ones(2, 4)), ValueError, "sinks: expected"),
    "align": (lambda: A(q4, k4, k4, align="left"), ValueError, "align: expected one of"),
    "window": (lambda: A(q4, k4, k4, window=3), ValueError, "window: expected"),
    "softcap": (lambda: A(q4, k4, k4, softcap=-1.0), ValueError, "softcap: expected"),
    "p": (lambda: A(q4, k4, k4, dropout_p=1.5, seed=1), ValueError, "dropout_p: expected"),
    "softcap None": (lambda: A(qg, k4, k4, softcap=None), TypeError, "softcap: expected"),
    "p None": (lambda: A(qg, k4, k4, dropout_p=None), TypeError, "dropout_p: expected"),
    "p pair": (lambda: A(qg, k4, k4, dropout_p=R(2)), ValueError, "dropout_p: expected a number"),
    "B, gradients": (lambda: A(qg, k4[:1], k4[:1]), ValueError, "k: expected .* B = 2"),
    "scale": (lambda: A(q4, k4, k4, scale="x"), TypeError, "scale: expected a number"),
    "scale NaN": (lambda: A(q4, k4, k4, scale=math.nan), ValueError, "scale: expected a finite"),
    "scale tensor": (lambda: A(q4, k4, k4, scale=R(())), TypeError, "scale: .* multiply q"),
    "softcap inf": (lambda: A(q4, k4, k4, softcap=math.inf), ValueError, "softcap: expected"),
    "align list": (lambda: A(q4, k4, k4, align=[]), ValueError, "align: expected one of"),
    "seed": (lambda: A(q4, k4, k4, dropout_p=0.5, seed=0.5), TypeError, "seed: expected"),
    "cu dtype": (lambda: V(q3, q3, q3, i32.long(), i32), TypeError, "cu_seqlens_q: expected"),
    "cu falls": (lambda: V(q3, q3, q3, i32, i32.flip(0)), ValueError, "cu_seqlens_k: expected"),
    "cu end": (lambda: V(q3, q3, q3, i32 + 1, i32), ValueError, "cu_seqlens_q: expected"),
    "cu wraps": (lambda: V(q3.double(), q3.double(), q3.double(), WRAPS, WRAPS), ValueError,
                 "cu_seqlens_q: expected entries that rise"),
    "cu count": (lambda: V(q3, q3, q3, i32, i32[:2]), ValueError, "cu_seqlens_k: expected"),
    "max": (lambda: V(q3, q3, q3, i32, i32, 1, 3), ValueError, "max_seqlen_q: expected"),
    "max str": (lambda: V(q3, q3, q3, i32, i32, 3, "3"), TypeError, "max_seqlen_k: "),
    "capacity": (lambda: C(q4[:, :, :2], c4, c4, k4[:, :, :2], k4[:, :, :2], cache_seqlens=n2),
                 ValueError, "cache_seqlens"),
    "no length": (lambda: C(q4, c4, c4, k4, k4), ValueError, "cache_seqlens: expected with k"),
    "entry": (lambda: C(q4, c4, c4, cache_seqlens=n2, cache_batch_idx=n2), ValueError,
              "cache_batch_idx"),
    "entry and page": (lambda: C(q4, c4, c4, cache_seqlens=n2, cache_batch_idx=n2 * 0,
                                 block_table=n2[:, None] * 0), ValueError, "no meaning beside"),
    "page": (lambda: C(q4, c4, c4, cache_seqlens=n2, block_table=n2[:, None]), ValueError,
             "block_table"),
    "pad": (lambda: C(q4, c4, c4, cache_seqlens=n2, cache_leftpad=n2 + 1), ValueError,
            "cache_leftpad"),
    "length": (lambda: C(q4, c4, c4, cache_seqlens=2**40), ValueError, "cache_seqlens: .* <= 16"),
    "no v": (lambda: C(q4, c4, None, cache_seqlens=n2), TypeError, "v_cache: expected"),
    "cos list": (lambda: C(q4, c4, c4, cache_seqlens=n2, rotary_cos=[1], rotary_sin=[1]), TypeError,
                 "rotary_cos: expected"),
    "table list": (lambda: C(q4, c4, c4, block_table=[[0], [1]]), TypeError, "block_table: "),
    "expanded": (lambda: C(q4[:, :, :1], c4[:1].expand(2, -1, -1, -1), c4, k4[:, :, :1],
                           k4[:, :, :1], cache_seqlens=n2), ValueError, "k_cache: .* of its own"),
    "only k": (lambda: C(q4, c4, c4, k4, cache_seqlens=n2), ValueError, "k, v: expected both"),
    "only cos": (lambda: C(q4, c4, c4, cache_seqlens=n2, rotary_cos=torch.ones(9, 4)), ValueError,
                 "rotary_cos, rotary_sin"),
    "short cos": (lambda: C(q4, c4, c4, cache_seqlens=n2, rotary_cos=torch.ones(9, 4),
                            rotary_sin=torch.ones(9, 4)), ValueError, "rotary_cos: expected"),
    "few entries": (lambda: C(q4, c4[:1], c4[:1], cache_seqlens=1), ValueError,
                    "k_cache: expected at least one entry per batch row"),
    "rotary flag": (lambda: C(q4, c4, c4, rotary_interleaved="x"), TypeError,
                    "rotary_interleaved: expected a bool"),
    "huge scale": (lambda: A(q4, q4, q4, scale=10**400), ValueError, "scale: expected a finite"),
    "sdpa heads": (lambda: S(q4, k4, k4), ValueError, "enable_gqa=True"),
    "sdpa p": (lambda: S(qg, q4, q4, None, None), TypeError, "dropout_p: expected"),
    "sdpa mask": (lambda: S(q4, q4, q4, torch.ones(5, 4)), ValueError, "attn_mask: expected"),
    "sdpa int mask": (lambda: S(q4, q4, q4, torch.ones(5, 5).int()), TypeError, "attn_mask"),
    "sdpa 1-D": (lambda: S(q4[0, 0, 0], q4[0, 0, 0], q4[0, 0, 0]), ValueError, "at least 2"),
    "sdpa no query": (lambda: S(None, q4, q4), TypeError, "query: expected a torch.Tensor"),
    "sdpa no key": (lambda: S(q4, None, q4), TypeError, "key: expected a torch.Tensor"),
    "sdpa text": (lambda: S(q4, q4, q4, "causal"), TypeError, "attn_mask: expected a torch.Tensor"),
    "sdpa sparse": (lambda: S(q4.to_sparse(), q4, q4), TypeError, "query: expected a dense"),
    "sdpa length": (lambda: S(q4, q4, q4[:, :, :3]), ValueError, "value: expected key's length"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name):
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call()
    with genfast.backend("reference"), pytest.raises(error, match=text):
        call()

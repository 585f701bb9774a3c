"""Tiny real models, made from configurations: random weights, a tokenizer trained on our own docs."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 600

# Every shape is small, and weights are large enough for answers to depend on the attention.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOW = {"sliding_window": 20}
_GPT2 = {
    **{
        k: _SHAPE[k]
        for k in (
            "vocab_size",
            "initializer_range",
            "tie_word_embeddings",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        )
    },
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
}


def _without(*names: str, **more: Any) -> dict[str, Any]:
    return {**{k: v for k, v in _SHAPE.items() if k not in names}, **more}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "qwen2": _without("head_dim"),
    "qwen3": _SHAPE,
    "qwen2_moe": _without("head_dim", num_experts=4, shared_expert_intermediate_size=32, decoder_sparse_step=1, **_MOE),
    "qwen3_moe": _without(num_experts=4, **_MOE),
    "mistral": _without(**_WINDOW),
    "mixtral": _without(num_local_experts=4, num_experts_per_tok=2, **_WINDOW),
    "gemma": _SHAPE,
    "gemma2": _without(query_pre_attn_scalar=16, **_WINDOW),
    "gemma3_text": _without(query_pre_attn_scalar=16, **_WINDOW),
    "gemma3n_text": _without(
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 4,
        **_WINDOW,
    ),
    "phi": _without("head_dim"),
    "phi3": _without("head_dim", **_WINDOW),
    "gpt_oss": _without(
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        **_WINDOW,
    ),
    "olmo": _without("head_dim"),
    "olmo2": _without("head_dim"),
    "olmo3": _without("head_dim", **_WINDOW),
    "olmoe": _without("head_dim", num_experts=4, num_experts_per_tok=2),
    "granite": _without("head_dim", attention_multiplier=0.25),
    "granitemoe": _without("head_dim", num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.25),
    "smollm3": _without("head_dim", no_rope_layers=[1, 1, 1, 0]),
    "starcoder2": _without("head_dim", **_WINDOW),
    "gpt2": _GPT2,
    "gpt_neox": _without("head_dim", "num_key_value_heads"),
    "cohere": _without("head_dim", logit_scale=1.0),
    "cohere2": _without(logit_scale=1.0, **_WINDOW),
    "deepseek_v3": _without(
        "head_dim",
        "num_key_value_heads",
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=24,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        **_MOE,
    ),
    "opt": {
        **_without("head_dim", "num_key_value_heads", "intermediate_size", "initializer_range"),
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        "init_std": 0.15,
    },
    "glm4": _SHAPE,
    "nemotron": _SHAPE,
    "stablelm": _without("head_dim"),
    "ernie4_5": _SHAPE,
    "exaone4": _without(sliding_window_pattern=4, **_WINDOW),
    "seed_oss": _SHAPE,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens with a chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train(
        [str(path) for path in sorted((ROOT / "docs").glob("*.md"))],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<pad>", "<s>", "</s>", "<|role|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|role|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
    )
    return fast


def make_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny float32 model of this architecture with eager attention."""
    config = CONFIG_MAPPING[model_type](**{**ARCHITECTURES.get(model_type, _SHAPE), **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def save_model(folder: Path, model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Write a tiny model with its tokenizer to `folder` as a hub model would be, and return it."""
    model = make_model(model_type, seed, **overrides)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def prompts() -> list[list[int]]:
    """Shared prefixes on two levels, a prompt that is a prefix of another, lone ones, and one of a single token."""
    rng = random.Random(7)

    def ids(n: int) -> list[int]:
        return [rng.randrange(4, VOCAB_SIZE) for _ in range(n)]

    root, left = ids(32), ids(17)
    return [
        root + left + ids(5),
        root + left + ids(9),
        root + ids(3),
        root + left,
        ids(41),
        ids(1),
        root + left + ids(2),
    ]

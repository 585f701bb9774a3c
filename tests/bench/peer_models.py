"""Models for comparing engines: real shapes with seeded random weights, as a transformers folder and as GGUF.

Both hold the same bfloat16 numbers. What such a model writes is noise; the work per token is that of the real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NUM_TRAINED_TOKENS = 2048
_COMMON: dict[str, Any] = {
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "dtype": "bfloat16",
}
SHAPES: dict[str, PreTrainedConfig] = {
    "135m": LlamaConfig(  # SmolLM2-135M's
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        architectures=["LlamaForCausalLM"],
        **_COMMON,
    ),
    "500m": Qwen2Config(  # Qwen2.5-0.5B's
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        architectures=["Qwen2ForCausalLM"],
        **_COMMON,
    ),
}

# The converter knows tokenizers by a fingerprint; ours is new to it, and splits text as GPT-2's does.
_CONVERT = """
import runpy, sys
source, folder, outfile = sys.argv[1:]
sys.path.insert(0, source)
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile", outfile]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def make_folder(config: PreTrainedConfig, folder: Path, texts: list[Path]) -> None:
    """Write config, bfloat16 safetensors and tokenizer to `folder`, as a hub model would be."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(config.vocab_size, texts).save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    randomize(model)
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(folder)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Fill in weights under which the answer depends on every layer: activations keep their size through the stack."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        else:  # linears keep the variance; embeddings and biases are small
            std = weight.shape[1] ** -0.5 if weight.dim() == 2 and "embed" not in name else 0.06
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def make_tokenizer(vocab_size: int, texts: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on `texts` and padded to `vocab_size` with words that no text is made of.

    Every id decodes to text of its own, so that a stream of random tokens has one chunk for each.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train(
        [str(path) for path in texts],
        trainers.BpeTrainer(
            vocab_size=NUM_TRAINED_TOKENS,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    parts = json.loads(trained.to_str())
    vocab = parts["model"]["vocab"]
    vocab |= {f"Ġ{i:06d}": i for i in range(len(vocab), vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def make_gguf(llama_cpp: Path, folder: Path, outfile: Path) -> None:
    """Convert `folder` by llama.cpp's own converter."""
    command = [sys.executable, "-c", _CONVERT, str(llama_cpp), str(folder), str(outfile)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"The conversion of {folder} failed:\n{done.stderr[-3000:]}")

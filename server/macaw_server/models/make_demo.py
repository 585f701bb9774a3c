"""Makes the folder of `macaw-demo`: ``python -m macaw_server.models.make_demo TEXT_FILE...``.

The tokenizer is trained on the given texts (the project's own docs); the model's weights are random and made anew at
each load from a fixed seed, so what it writes is noise. Run again only to change the tokenizer or the shape.
"""

from __future__ import annotations

import sys
from pathlib import Path

from macaw_server.models.loader import DEMO_FOLDER

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_demo(texts: list[Path], folder: Path) -> None:
    """Train the tokenizer on `texts` and write config, generation config and tokenizer to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train(
        [str(path) for path in texts],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (DEMO_FOLDER / "chat_template.jinja").read_text()
    fast.save_pretrained(folder)
    end = fast.convert_tokens_to_ids("<|im_end|>")
    LlamaConfig(
        vocab_size=len(fast),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    GenerationConfig(eos_token_id=end, pad_token_id=fast.pad_token_id).save_pretrained(folder)


if __name__ == "__main__":
    make_demo([Path(name) for name in sys.argv[1:]], DEMO_FOLDER)

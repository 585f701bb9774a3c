"""What constrained decoding costs: the mask of a token, and tokens per second beside free output.

    PYTHONPATH=tests python tests/bench/constrained.py [--rounds 9] [--batch 8]

The model has random weights and a vocabulary of 32,768 tokens, a tokenizer trained on this repository's text. Free and
constrained runs alternate, over the same prompts and the same number of tokens; what a constrained run wrote is checked
before its time counts. Masks are made in a thread while the model runs, so the ratio shows what is left of their cost.
*compile* is what a grammar takes that is not in the cache of the last few.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.grammar import GrammarState, Vocabulary, compile_grammar
from macaw_server.engine.types import EngineRequest, SamplingParams
from tiny_models import make_model

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 32_768
NUM_TOKENS = 64
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "head_dim": 32,
}
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "note": {"type": "string"},
    },
    "required": ["name", "age", "tags", "note"],
    "additionalProperties": False,
}


class Case(NamedTuple):
    """A grammar, and a pattern that the beginning of every match has."""

    grammar: str
    beginning: str


CASES = {
    "schema": Case(LLMatcher.grammar_from_json_schema({"type": "array", "items": RECORD, "minItems": 99}), r"\[\s*\{?"),
    "json_object": Case(LLMatcher.grammar_from_json_schema({"type": "object", "minProperties": 99}), r"\{"),
    "regex": Case(LLMatcher.grammar_from_regex(r"([A-Z][a-z]{1,9}[ ,])+\."), r"[A-Z]"),
    "choice": Case(
        LLMatcher.grammar_from_regex("|".join(f"answer {i:04} {'x' * 300}" for i in range(1000))), r"answer"
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on this repository and padded with pairs of its words."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [path.read_text() for pattern in ("**/*.py", "**/*.md") for path in sorted(ROOT.glob(pattern))]
    words = sorted({word for text in texts for word in re.findall(r"[a-z]{3,8}", text)})
    rng = random.Random(0)
    texts.append(" ".join(rng.choice(words) + rng.choice(words) for _ in range(40_000)))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def random_walk(state: GrammarState, rng: random.Random) -> Iterator[float]:
    """Seconds of each mask on a random way through a grammar."""
    for _ in range(NUM_TOKENS):
        begin = time.perf_counter()
        mask = state.masks()[0]
        yield time.perf_counter() - begin
        state.accept([rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())])
        if state.over:
            return


def generate(core: EngineCore, grammar: str | None, batch: int, round_: int) -> tuple[float, list[list[int]]]:
    """Seconds and outputs of a batch; the prompts are new in each round."""
    rng = random.Random(round_)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=round_, grammar=grammar)
    outputs: dict[str, list[int]] = {}
    for i in range(batch):
        name = f"{round_}-{i}"
        outputs[name] = []
        assert core.add(EngineRequest(name, [rng.randrange(3, VOCAB_SIZE) for _ in range(16)], params)) is None
    begin = time.perf_counter()
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            outputs[output.request_id] += output.token_ids
    return time.perf_counter() - begin, list(outputs.values())


def compare(core: EngineCore, case: Case, tokenizer: PreTrainedTokenizerFast, batch: int, rounds: int) -> str:
    """Alternate free and constrained runs; the first pair warms up, and compiles."""
    ratios, rates = [], []
    for round_ in range(rounds + 1):
        free_s, free = generate(core, None, batch, round_)
        held_s, held = generate(core, case.grammar, batch, round_)
        for output in held:
            if not re.match(case.beginning, tokenizer.decode(output)):
                sys.exit(f"a constrained run wrote {tokenizer.decode(output)!r}")
        rates.append(sum(map(len, free)) / free_s)
        ratios.append(sum(map(len, held)) / held_s / rates[-1])
    middle, rate = statistics.median(ratios[1:]), statistics.median(rates[1:])
    return f"{middle:.3f} ({min(ratios[1:]):.3f} to {max(ratios[1:]):.3f})   free: {rate:.0f} tokens/s"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    begin = time.perf_counter()
    vocabulary = Vocabulary.of(tokenizer, VOCAB_SIZE)
    print(f"vocabulary of {len(tokenizer):,} tokens, read once in {time.perf_counter() - begin:.2f} s\n")
    print(f"{'mask, ms':12} median   p95      first token of a sequence   compile, ms")
    for name, case in CASES.items():
        compile_ms = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            compiled = compile_grammar(vocabulary.tokenizer, case.grammar)
            compile_ms.append(1000 * (time.perf_counter() - begin))
        walks = []
        for seed in range(20):
            state = GrammarState(compiled, vocabulary, SamplingParams(NUM_TOKENS))
            walks.append([1e3 * seconds for seconds in random_walk(state, random.Random(seed))])
        later = [ms for walk in walks for ms in walk[1:]]
        first = statistics.median(walk[0] for walk in walks)
        masks = f"{statistics.median(later):6.3f}   {np.quantile(later, 0.95):6.3f}   {first:25.3f}"
        print(f"{name:12} {masks}   {statistics.median(compile_ms):11.1f}")
    with tempfile.TemporaryDirectory() as folder:
        make_model("llama", vocab_size=VOCAB_SIZE, **SHAPE).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = {"dtype": "float32", "max_num_seqs": args.batch, "max_model_len": 256, "threads": args.threads}
        core = EngineCore(EngineConfig(model=folder, **config))
        print(f"\n{args.batch} sequences; constrained / free tokens per second, {args.rounds} pairs of runs")
        for name, case in CASES.items():
            print(f"{name:12} {compare(core, case, tokenizer, args.batch, args.rounds)}")


if __name__ == "__main__":
    main()

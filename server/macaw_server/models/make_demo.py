"""Makes the weights of `macaw-demo`: ``python -m macaw_server.models.make_demo OUT [--steps N]``.

A Llama of 2.0 million parameters learns to summarise and to answer from the chats of `demo_text`, on one CPU core, in
about 40 minutes; before that, its tokenizer is made from them. Config and chat template are those in `models/demo/`.
Each step's data comes from its number, so that a run that was interrupted goes on from its last
checkpoint in OUT to the same weights. On the same kind of CPU and version of torch the run is deterministic: the hash
of the weights is in docs/demo-model.md.
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from macaw_server.models.demo_text import make_chat
from macaw_server.models.loader import DEMO_FOLDER

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER_SEED, TOKENIZER_CHATS = 10**12, 4000
BATCH_TOKENS = 2048
POOL_BATCHES = 16
PADDED_TO = 16  # tokens; few shapes
MATRIX_RATE, EMBEDDING_RATE, WARM_UP_STEPS = 0.02, 3e-3, 50
READING_WEIGHT, READING_SHARE = 0.5, 1 / 6  # what is read is learnt too, a little
CHECKPOINT_STEPS = 250


class Stage(NamedTuple):
    """What is learnt up to a step: copying first, then short chats, then all of them, then mostly what is hardest.

    Attributes:
        end: The first step of the next stage.
        copied: Share of chats that ask for a copy.
        longest: Chat, in tokens.
        combined: Weight of chats that combine summaries.
    """

    end: float
    copied: float
    longest: float
    combined: float = 0.18


LEARNT_STEPS = 4000  # then the learning rate is at 0, and once more half as high for what is hardest
STAGES = (
    Stage(800, 0.6, 120),
    Stage(1760, 0.2, 120),
    Stage(LEARNT_STEPS, 0.1, math.inf),
    Stage(math.inf, 0.05, math.inf, combined=1.0),
)
Row = tuple[list[int], list[float]]  # token ids of a chat, and their weights in the loss


@dataclass(frozen=True, slots=True)
class Batch:
    """Chats of similar length, padded at the right.

    Attributes:
        tokens: Token ids [rows, length].
        weights: Of each position's prediction of the next token [rows, length]; 1 in answers, little in what is read.
    """

    tokens: torch.Tensor
    weights: torch.Tensor


class Lessons:
    """The batch of each step, the same for the same step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        decoded = (tokenizer.decode([i]) for i in range(len(tokenizer)))
        self._words = [w for w in decoded if len(w) > 3 and w[0] == " " and w[1:].isalpha() and w.isascii()]
        self._pool: tuple[int, list[Batch]] = (-1, [])

    def batch(self, step: int) -> Batch:
        """The batch of `step`: chats are drawn by the pool, sorted by length so that little is padded."""
        pool, place = divmod(step, POOL_BATCHES)
        if self._pool[0] != pool:
            stage = next(stage for stage in STAGES if step < stage.end)
            self._pool = pool, self._make_pool(random.Random(pool), stage)
        return self._pool[1][place]

    def _make_pool(self, rng: random.Random, stage: Stage) -> list[Batch]:
        rows, num_tokens = [], 0
        while num_tokens < POOL_BATCHES * BATCH_TOKENS:
            row = self._row(rng, stage)
            if len(row[0]) <= stage.longest:
                rows.append(row)
                num_tokens += len(row[0])
        rows.sort(key=lambda row: len(row[0]))
        batches = []
        for left in range(POOL_BATCHES, 0, -1):  # equal parts of the tokens
            share, size = [], 0
            while rows and size < num_tokens / left:
                share.append(rows.pop())
                size += len(share[-1][0])
            num_tokens -= size
            batches.append(_pad(share))
        rng.shuffle(batches)
        return batches

    def _row(self, rng: random.Random, stage: Stage) -> Row:
        """A chat, up to its last answer."""
        chat = make_chat(rng, self._words, stage.copied, stage.combined)
        ids, weights, done = [], [], 0
        for i in range(1, len(chat)):
            if chat[i]["role"] == "assistant":
                prompt = self._tokenizer.apply_chat_template(chat[:i], add_generation_prompt=True, tokenize=False)
                read = self._tokenizer(prompt[done:], add_special_tokens=False).input_ids
                answer = self._tokenizer(chat[i]["content"] + "<|im_end|>", add_special_tokens=False).input_ids
                ids += read + answer
                weights += [READING_WEIGHT * (rng.random() < READING_SHARE) for _ in read] + [1.0] * len(answer)
                done = len(prompt) + len(chat[i]["content"] + "<|im_end|>")
        return ids, weights


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on the chats, and write it to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    rng = random.Random(TOKENIZER_SEED)
    chats = (make_chat(rng, [" word"], 0.0) for _ in range(TOKENIZER_CHATS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for chat in chats for message in chat for text in message.values()),
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
    fast.chat_template = (DEMO_FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _pad(rows: list[Row]) -> Batch:
    import torch

    length = math.ceil(max(len(ids) for ids, _ in rows) / PADDED_TO) * PADDED_TO
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for row, (ids, of) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids) - 1] = torch.tensor(of[1:])  # a position predicts the next token
    return Batch(tokens, weights)


def rate(step: int, num_steps: int) -> float:
    """The share of the peak learning rate: up, level, down to nothing; and once more from half of it."""
    if step < LEARNT_STEPS:
        return min((step + 1) / WARM_UP_STEPS, 1.0, (LEARNT_STEPS - step) / (0.6 * LEARNT_STEPS))
    return 0.5 * (num_steps - step) / (num_steps - LEARNT_STEPS)


def _attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """Causal attention in float32, which CPUs do faster than bfloat16; of the shapes that transformers gives."""
    import torch
    import torch.nn.functional as F

    with torch.autocast("cpu", enabled=False):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query.float(), key, value, is_causal=True)
    return out.transpose(1, 2).contiguous().to(query.dtype), None


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean of the cross entropy, in nats per token."""
    import torch.nn.functional as F

    places = batch.weights.flatten().nonzero().squeeze(1)
    hidden = model.model(batch.tokens).last_hidden_state.flatten(0, 1)[places]
    targets = batch.tokens.roll(-1, dims=1).flatten()[places]
    weights = batch.weights.flatten()[places]
    losses = F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def train(out: Path, num_steps: int) -> str:
    """Train for `num_steps` steps, from the last checkpoint in `out` if there is one.

    Returns:
        The SHA-256 of `out`/model.safetensors.
    """
    import torch
    from transformers import AttentionInterface, AutoConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # sums do not depend on the number of cores
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    lessons = Lessons(make_tokenizer(out))
    config = AutoConfig.from_pretrained(DEMO_FOLDER)
    config.initializer_range = 0.02
    AttentionInterface.register("macaw_demo", _attend)
    model = LlamaForCausalLM._from_config(config, attn_implementation="macaw_demo", dtype=torch.float32)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    of_layers = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in of_layers]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    peaks = [MATRIX_RATE, EMBEDDING_RATE]
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, first = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    started, recent = time.monotonic(), 0.0
    for step in range(first, num_steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, num_steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, lessons.batch(step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent = loss.item() if step == first else 0.98 * recent + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            typer.echo(f"step {step + 1} of {num_steps}, loss {recent:.3f}, {pace:.2f} s a step")
        if (step + 1) % CHECKPOINT_STEPS == 0:
            saved = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(
                {"model": model.state_dict(), "optimizers": saved, "step": step + 1}, checkpoint.with_suffix(".new")
            )
            checkpoint.with_suffix(".new").replace(checkpoint)
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(DEMO_FOLDER / name, out / name)
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint and, in the end, the model.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 5400,
) -> None:
    """Train macaw-demo."""
    typer.echo(f"model.safetensors: sha256 {train(out, steps)}")


if __name__ == "__main__":
    typer.run(main)

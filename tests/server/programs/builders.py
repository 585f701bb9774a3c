"""Short ways to write programs and tokenizers in tests."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from macaw.errors import MacawError
from macaw.protocol import Call, Event, ProgramRequest, Target, Transform
from macaw_server.programs.calls import CallNode
from macaw_server.programs.program import Program


def call(call_id: str, *inputs: str, **fields: Any) -> Call:
    """A chat call `x` whose prompt holds the variables `inputs`, and whose output is `x.out`."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"{call_id}:"}]
    parts += [{"type": "variable", "variable": name} for name in inputs]
    request = {"messages": [{"role": "user", "content": parts}], **fields}
    return Call.model_validate({"id": call_id, "output": f"{call_id}.out", "request": request})


def transform(transform_id: str, op: str, *inputs: str, **args: Any) -> Transform:
    """A transform `x` whose output is `x.out`."""
    return Transform.model_validate(
        {"id": transform_id, "op": op, "inputs": list(inputs), "output": f"{transform_id}.out", "args": args}
    )


def targets(*names: str, objective: Any = "latency", deadline_ms: float | None = None) -> list[Target]:
    return [Target(variable=name, objective=objective, deadline_ms=deadline_ms) for name in names]


def program(*steps: Call | Transform, target: str | list[Target] | None = None, **fields: Any) -> Program:
    """A program of steps; `target` is a variable name, or the list of targets."""
    return Program("p", request(*steps, target=target, **fields))


def request(*steps: Call | Transform, target: str | list[Target] | None = None, **fields: Any) -> ProgramRequest:
    return ProgramRequest(
        calls=[step for step in steps if isinstance(step, Call)],
        transforms=[step for step in steps if isinstance(step, Transform)],
        targets=targets(target) if isinstance(target, str) else target or [],
        **fields,
    )


def completion(text: str, num_tokens: int = 1) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": num_tokens}}


def take(program: Program, now_ms: float = 0.0) -> list[str]:
    return [node.call.id for node in program.take_ready(now_ms)]


def complete(program: Program, call_id: str, text: str = "", now_ms: float = 0.0) -> list[Event]:
    """Finish a call that was handed out."""
    text = text or f"<{call_id}>"
    return program.call_completed(call_id, completion(text), text, now_ms)


def run(program: Program) -> list[str]:
    """Finish every call that gets ready; the order in which they were handed out."""
    order = []
    while nodes := program.take_ready(0.0):
        for node in nodes:
            order.append(node.call.id)
            complete(program, node.call.id)
    return order


def prompt(program: Program, node: CallNode) -> str:
    """A chat call's prompt with its variables filled in."""
    values = program.values(node)
    parts = node.call.request.parts
    return "".join(part.text if part.type == "text" else values[part.variable] for part in parts)


def kinds(events: list[Any]) -> list[str]:
    """Events in short: `call.started a`, `variable.resolved x`, `program.completed`."""
    names = (getattr(event, "call_id", None) or getattr(event, "variable", None) for event in events)
    return [f"{event.type} {name}" if name else event.type for event, name in zip(events, names, strict=True)]


class BoomError(MacawError):
    """Any error of a call."""

    default_code = "boom"


TEXT = [
    "The macaw is a parrot of the forests of the south; it eats seeds, and clay.",
    "Blue and yellow, scarlet, and hyacinth: naïve façade, Ärger, œuvre, déjà vu.",
    "Emoji 😀 and 🦜🦜, flags 🇧🇷, families 👩‍👩‍👧, 中文字符, and tabs\tand\n\nnew lines.",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: every byte is a token, merges may cut through characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece_style_tokenizer() -> PreTrainedTokenizerFast:
    """BPE as Llama 2's: a leading space in front of the text, and bytes for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    plain = [line.encode("ascii", "ignore").decode() for line in TEXT]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(plain * 3, trainer)
    # The trainer makes the bytes special tokens, but they are ordinary ones: build it from the vocabulary.
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    vocab = tokenizer.get_vocab()
    rebuilt = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rebuilt.normalizer, rebuilt.decoder = tokenizer.normalizer, tokenizer.decoder
    rebuilt.add_special_tokens(special)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=rebuilt, **names)

"""What is known of a prompt before all of its variables are, as tokens that warm the cache.

A prefix that is wrong (the template looks at what comes later, a token reaches over the cut) costs time and never
an answer: the call itself is rendered and tokenised as a whole when its inputs are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from macaw.protocol import Call, ChatCompletionRequest, CompletionRequest, JoinArgs, Transform

from .dataflow import Dataflow
from .rendering import Tokenizer, prompt_text

SENTINEL = "\ue0b5\uf1d3\ue4a7"
"""Stands for what is not known; of the private use area, so that no text has it."""

_MAX_WORD_CHARS = 64
"""A longer word may end in tokens that change when it goes on."""
_NUM_UNSTABLE = 2
"""Tokens left out at the end: punctuation and line breaks may merge with what follows."""
_OVERLAP = 16
"""Tokens at the end of a known prefix that are tokenised again with the text that follows."""
_MAX_DEPTH = 16
_MAX_CHARS_PER_TOKEN = 16


class Partial(NamedTuple):
    """The beginning of a value.

    Attributes:
        text: A prefix of what the variable will be.
        source: The call whose answer goes on with it, if one is at work on that.
    """

    text: str
    source: str | None


class KnownPrompt(NamedTuple):
    """The stable beginning of a prompt: its text, and that text's tokens."""

    text: str
    token_ids: list[int]


def partial_value(flow: Dataflow, name: str, answer_so_far: Callable[[str], str], depth: int = 0) -> Partial:
    """What is known of a variable without a value.

    Goes through the transforms that make prefixes of prefixes: `join`, `strip` and `html_escape`.

    Args:
        flow: The program's.
        name: Of the variable.
        answer_so_far: The text of a call that is at work.
        depth: Transforms passed already.
    """
    step_id = flow.graph.producers[name]
    if step_id is None or depth == _MAX_DEPTH:
        return Partial("", None)
    step = flow.graph.steps[step_id]
    if isinstance(step, Call):
        return Partial(answer_so_far(step_id), step_id)
    if step.op == "join":
        return _partial_join(flow, step, answer_so_far, depth)
    if step.op in ("strip", "html_escape"):
        partial = partial_value(flow, step.inputs[0], answer_so_far, depth + 1)
        return partial._replace(text=flow.graph.functions[step_id]([partial.text]))
    return Partial("", None)


def known_prompt(
    request: ChatCompletionRequest | CompletionRequest,
    values: Mapping[str, str],
    tokenizer: Tokenizer,
    before: KnownPrompt | None,
    max_tokens: int,
) -> KnownPrompt:
    """Render and tokenise a prompt up to the first text that is not known.

    Args:
        request: The call's.
        values: Of all variables in the prompt; what is not known ends in, or is, `SENTINEL`.
        tokenizer: The model's.
        before: What was known last time: where the text goes on from there, only its end is tokenised again.
        max_tokens: More than the context holds is nothing worth knowing.

    Raises:
        InvalidRequestError: The model's template refuses the messages.
    """
    rendered = prompt_text(request, values, tokenizer)
    text = _stable(rendered[: rendered.find(SENTINEL)]) if SENTINEL in rendered else ""
    if not text or len(text) > max_tokens * _MAX_CHARS_PER_TOKEN:
        return KnownPrompt("", [])
    token_ids = None if before is None else _extended(before, text, tokenizer)
    if token_ids is None:
        chat = isinstance(request, ChatCompletionRequest)
        token_ids = tokenizer.encode(text, add_special_tokens=not chat)
    return KnownPrompt(text, token_ids)


def stable_tokens(known: KnownPrompt, page_size: int, max_tokens: int) -> list[int]:
    """Those of a prompt's tokens that will hardly change, in full pages."""
    num_tokens = min(len(known.token_ids) - _NUM_UNSTABLE, max_tokens)
    return known.token_ids[: max(0, num_tokens) // page_size * page_size]


def _partial_join(flow: Dataflow, join: Transform, answer_so_far: Callable[[str], str], depth: int) -> Partial:
    args = join.typed_args
    assert isinstance(args, JoinArgs)
    known = flow.values(join.inputs)
    kept: list[str] = []
    for name in join.inputs:
        value, source = (known[name], None) if name in known else partial_value(flow, name, answer_so_far, depth + 1)
        if value.strip() or not args.drop_blank:
            kept.append(value.strip() if args.strip else value)
        if name not in known:
            return Partial(args.separator.join(kept), source)
    return Partial(args.separator.join(kept), None)


def _stable(text: str) -> str:
    """Without the last word, which may go on, and the white space before it, which goes with what follows."""
    start = max(0, len(text) - _MAX_WORD_CHARS)
    cut = max(text.rfind(space, start) for space in " \n\t")
    return text[: cut if cut >= 0 else start].rstrip()


def _extended(before: KnownPrompt, text: str, tokenizer: Tokenizer) -> list[int] | None:
    """The tokens of a text that goes on from one whose tokens are known, if its end tokenises as it did."""
    if len(before.token_ids) < 2 * _OVERLAP or not text.startswith(before.text):
        return None
    tail = tokenizer.decode(before.token_ids[-_OVERLAP:])
    if not before.text.endswith(tail):
        return None
    token_ids = tokenizer.encode(tail + text[len(before.text) :], add_special_tokens=False)
    sure = _OVERLAP // 2
    if token_ids[:sure] != before.token_ids[-_OVERLAP : -_OVERLAP + sure]:
        return None
    return before.token_ids[:-_OVERLAP] + token_ids

"""OpenAI's response objects: completions, their chunks, usage and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from macaw_server.engine.types import FinishReason
from macaw_server.programs.detokenizer import TokenText

ChoiceEnd = FinishReason | Literal["tool_calls"]
"""Why a choice ended, as OpenAI says it."""


class TokenReport(NamedTuple):
    """A token of the answer, its log-probability, and the most likely tokens in its place, best first."""

    token: TokenText
    logprob: float
    top: list[tuple[TokenText, float]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole choice; `reports` is None where no log-probabilities were asked for, `calls` where none were made."""

    text: str
    finish_reason: ChoiceEnd | None
    reports: Sequence[TokenReport] | None
    calls: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """Writes the objects of one completion.

    Attributes:
        id: Of the completion; unique over all programs.
        model: The served name.
        created: Unix seconds.
        chat: Chat completion, or else text completion.
    """

    id: str
    model: str
    created: int
    chat: bool

    @classmethod
    def of_call(cls, program_id: str, call_id: str, *, model: str, created: int, chat: bool) -> ResponseFormat:
        """The format of a program's call."""
        kind = "chatcmpl" if chat else "cmpl"
        return cls(f"{kind}-{program_id.removeprefix('prog-')}-{call_id}", model, created, chat)

    def chunk(
        self,
        index: int,
        text: str,
        *,
        text_offset: int,
        finish_reason: ChoiceEnd | None,
        reports: Sequence[TokenReport] | None,
        calls: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """New text, and pieces of calls, of choice `index`, behind `text_offset` characters of its tokens."""
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["delta"] = ({"content": text} if text else {}) | ({"tool_calls": list(calls)} if calls else {})
        else:
            choice["text"] = text
        choice |= {"logprobs": self._logprobs(reports, text_offset), "finish_reason": finish_reason}
        return self._object([choice], chunk=True)

    def role_chunk(self, index: int) -> dict[str, Any]:
        """A chat choice's first chunk."""
        delta = {"role": "assistant", "content": ""}
        return self._object([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], chunk=True)

    def completion(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, answer in enumerate(answers):
            choice: dict[str, Any] = {"index": index}
            if self.chat:
                message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
                if answer.calls:
                    message |= {"content": answer.text or None, "tool_calls": list(answer.calls)}
                choice["message"] = message
            else:
                choice["text"] = answer.text
            choices.append(
                choice | {"logprobs": self._logprobs(answer.reports, 0), "finish_reason": answer.finish_reason}
            )
        return self._object(choices, chunk=False) | {"usage": usage}

    def _object(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, reports: Sequence[TokenReport] | None, text_offset: int) -> dict[str, Any] | None:
        if reports is None:
            return None
        if self.chat:
            content = [
                _token(report.token, report.logprob) | {"top_logprobs": [_token(*entry) for entry in report.top]}
                for report in reports
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for report in reports:
            offsets.append(text_offset)
            text_offset += len(report.token.text)
        return {
            "tokens": [report.token.text for report in reports],
            "token_logprobs": [report.logprob for report in reports],
            "top_logprobs": [_top_with_chosen(report) for report in reports],
            "text_offset": offsets,
        }


def usage_object(*, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage; `cached_tokens` are prompt tokens that were not computed again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def add_usage(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The usage of two completions together."""
    return usage_object(
        prompt_tokens=first["prompt_tokens"] + second["prompt_tokens"],
        completion_tokens=first["completion_tokens"] + second["completion_tokens"],
        cached_tokens=first["prompt_tokens_details"]["cached_tokens"]
        + second["prompt_tokens_details"]["cached_tokens"],
    )


def _token(token: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": token.bytes}


def _top_with_chosen(report: TokenReport) -> dict[str, float]:
    """The most likely tokens by text, the best of those that look alike; and the chosen, as OpenAI does."""
    top: dict[str, float] = {}
    for token, logprob in [*report.top, (report.token, report.logprob)]:
        top.setdefault(token.text, logprob)
    return top

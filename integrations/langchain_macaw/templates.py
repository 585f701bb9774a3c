"""The requests of a plan: what a model would send natively, with variables where answers are missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from langchain_macaw.sentinel import NotStatic, StandIns
from macaw.protocol import ChatCompletionRequest, TextPart, VariablePart

_NOT_IN_KEY = ("stream", "stream_options")  # they say how the answer travels, not what it is


@dataclass(frozen=True, slots=True)
class Text:
    """A string with variables in it, in the place of a string."""

    parts: tuple[TextPart | VariablePart, ...]

    def with_values(self, values: Mapping[str, str]) -> str:
        """The text once its variables are known."""
        return "".join(part.text if isinstance(part, TextPart) else values[part.variable] for part in self.parts)


@dataclass(slots=True)
class RequestTemplate:
    """One request to come.

    Attributes:
        body: What the client would post, with `Text` in place of strings that are not known yet.
        variables: Names of the variables in it.
    """

    body: dict[str, Any]
    variables: set[str] = field(default_factory=set)
    _constant_key: str | None = None

    def key(self, values: Mapping[str, str]) -> str:
        """What `request_key` gives for the native request, given the values of `variables`."""
        if self.variables:
            return _canonical(self.body, lambda text: text.with_values(values))
        if self._constant_key is None:
            self._constant_key = _canonical(self.body, _not_json)
        return self._constant_key

    def wire_request(self) -> ChatCompletionRequest:
        """The request of the program's call.

        Raises:
            pydantic.ValidationError: A field that the protocol does not have, such as an image.
        """
        # By way of JSON: the types are then those of the wire, such as string keys in logit_bias.
        if not self.variables and all(isinstance(m.get("content"), str) for m in self.body["messages"]):
            return ChatCompletionRequest.model_validate_json(_json(self.body, _not_json))
        messages = [{**message, "content": _parts(message.get("content"))} for message in self.body["messages"]]
        body = {**self.body, "messages": messages}
        text = _json(body, lambda text: [part.model_dump() for part in text.parts])
        return ChatCompletionRequest.model_validate_json(text)


def request_template(
    build_payload: Callable[[StandIns], dict[str, Any]], stand_ins: tuple[StandIns, StandIns]
) -> RequestTemplate:
    """Build the same payload under two sets of stand-ins and keep what they agree on.

    Raises:
        NotStatic: They differ in more than their stand-ins, or one is not in the place of text.
    """
    template = RequestTemplate({})
    left, right = (request_body(build_payload(one)) for one in stand_ins)
    template.body = _merge(left, right, stand_ins, template.variables)
    return template


def request_body(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What `openai`'s client posts for `payload`, without the flags of how the answer travels."""
    body = {key: value for key, value in payload.items() if key not in _NOT_IN_KEY}
    body.update(body.pop("extra_body", None) or {})
    return body


def request_key(payload: Mapping[str, Any]) -> str:
    """The identity of a request: its whole body, canonically.

    Raises:
        TypeError: A value is not JSON.
    """
    return _canonical(request_body(payload), _not_json)


def _canonical(body: Mapping[str, Any], write_text: Callable[[Any], Any]) -> str:
    return _json(body, write_text, sort_keys=True)


def _json(body: Mapping[str, Any], write_text: Callable[[Any], Any], *, sort_keys: bool = False) -> str:
    """In the order of the body: a schema's properties are generated in theirs."""
    return json.dumps(body, sort_keys=sort_keys, ensure_ascii=False, separators=(",", ":"), default=write_text)


def _not_json(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} is not JSON")


def _merge(left: Any, right: Any, stand_ins: tuple[StandIns, StandIns], variables: set[str]) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        if left == right:
            return left
        parts = stand_ins[0].split(left)
        if parts != stand_ins[1].split(right):
            raise NotStatic("A prompt does something to a text that a model has yet to write.")
        variables.update(part.variable for part in parts if isinstance(part, VariablePart))
        return Text(parts)
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return {key: _merge(value, right[key], stand_ins, variables) for key, value in left.items()}
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [_merge(*pair, stand_ins, variables) for pair in zip(left, right, strict=True)]
    if left != right:
        raise NotStatic("A prompt renders differently each time.")
    return left


def _parts(content: Any) -> Any:
    """Message content as the protocol has it: blocks of text are parts of one string."""
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for block in content:
        if isinstance(block, dict) and isinstance(block.get("text"), Text):
            parts += [part.model_dump() for part in block["text"].parts]
        else:
            parts.append(block)
    return parts

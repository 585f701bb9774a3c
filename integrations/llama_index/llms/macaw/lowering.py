"""Lowering: calls that LlamaIndex will make, read ahead of time as the calls of a program.

LlamaIndex's own templates run on stand-ins for the answers that do not exist yet: short texts of private-use
characters and a nonce. Where they turn up in a request is where the program has its variables. A template that
does something else to an answer breaks its stand-in, and one that decides by an answer's text decides by the
stand-in's: then the request that is made in the end is not the one that was planned, and is sent as usual.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.llms.openai.utils import to_openai_message_dicts

from llama_index.llms.macaw.base import Macaw
from llama_index.llms.macaw.plan import Join, Parts, Plan, PlannedCall, Text
from macaw.protocol import Call, ProgramRequest, Target, TextPart, Transform, VariablePart

_MAX_NAME_LEN = 200
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:\-/\[\]]")
_START, _END = "\ue000", "\ue001"


class NotStatic(Exception):  # noqa: N818  (a verdict on a prompt, not an error of the user's)
    """A request cannot be told ahead of time."""


class Lowering:
    """Collects the calls of one run.

    Args:
        name: What is run; a label of the program.
        answers: Of the first calls, which have been made: they are no part of the program.

    Attributes:
        llm: Whose server the program is for; known with the first call.
        prefix: Goes before the names of the calls to come.
    """

    def __init__(self, name: str, answers: Iterable[str] = ()) -> None:
        self.llm: Macaw | None = None
        self.prefix = ""
        self._name = name
        self._answers = deque(answers)
        # Mixed case, so that changing the case of text with a stand-in in it breaks the stand-in.
        self._nonce = "aZ" + secrets.token_hex(4)
        self._pattern = re.compile(f"{_START}{self._nonce}([vj][0-9]+){_END}")
        self._calls: list[PlannedCall] = []
        self._joins: list[Join] = []

    def predict(self, llm: LLM, prompt: BasePromptTemplate, name: str, /, **prompt_args: Any) -> str:
        """Plan what ``llm.predict(prompt, **prompt_args)`` asks for.

        Returns:
            A stand-in for the answer; the answer itself, if it is known.

        Raises:
            NotStatic: The request depends on more than the text of answers.
            pydantic.ValidationError: The server would not take the request.
        """
        if not isinstance(llm, Macaw):
            raise NotStatic(f"{type(llm).__name__} is not Macaw.")
        if self._answers:
            return self._answers.popleft()
        if llm.metadata.is_chat_model:
            return self.chat(llm, llm._get_messages(prompt, **prompt_args), name)
        return self.complete(llm, llm._get_prompt(prompt, **prompt_args), name)

    def chat(self, llm: Macaw, messages: Sequence[ChatMessage], name: str, **kwargs: Any) -> str:
        """Plan what ``llm.chat(messages, **kwargs)`` of a chat model asks for; see `predict`."""
        contents: Any = to_openai_message_dicts(messages, model=llm.model)
        return self._add(llm, {"messages": contents, **llm._get_model_kwargs(**kwargs)}, name)

    def complete(self, llm: Macaw, prompt: str, name: str, **kwargs: Any) -> str:
        """Plan what ``llm.complete(prompt, formatted=True, **kwargs)`` asks for; see `predict`."""
        return self._add(llm, {"prompt": prompt, **llm._get_model_kwargs(**kwargs)}, name)

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return len(self._calls)

    def join(self, stand_ins: Sequence[str], separator: str) -> str:
        """A stand-in for the answers that are not blank, stripped, with `separator` between."""
        inputs = tuple(match[1] for text in stand_ins if (match := self._pattern.fullmatch(text)))
        assert len(inputs) == len(stand_ins), stand_ins
        self._joins.append(Join(f"j{len(self._joins)}", inputs, separator))
        return self._stand_in(self._joins[-1].output)

    def plan(self) -> Plan | None:
        """The program that was collected, whose targets are the answers that no call reads; None for no calls."""
        if not self._calls:
            return None
        read = {name for join in self._joins for name in join.inputs}
        read.update(name for call in self._calls for name in call.variables)
        request = ProgramRequest(
            calls=[_wire_call(call) for call in self._calls],
            transforms=[_wire_join(join) for join in self._joins],
            targets=[Target(variable=call.output) for call in self._calls if call.output not in read],
            stream=True,
            metadata={"engine": self._name},
        )
        return Plan(request, self._calls, self._joins)

    def _add(self, llm: Macaw, body: dict[str, Any], name: str) -> str:
        if not llm._can_join(self.llm):
            raise NotStatic("Calls to different servers, or with headers of their own, are no program.")
        self.llm = self.llm or llm
        body.update(body.pop("extra_body", None) or {})
        body.pop("macaw", None)
        body.pop("extra_headers", None)
        variables: set[str] = set()
        body = self._with_variables(body, variables)
        output = f"v{len(self._calls)}"
        name = _NOT_IN_NAMES.sub("_", self.prefix + name)[-_MAX_NAME_LEN:]
        if any(call.id == name for call in self._calls):
            name = f"{name}-{len(self._calls)}"
        self._calls.append(PlannedCall(name, output, body, frozenset(variables)))
        return self._stand_in(output)

    def _with_variables(self, value: Any, variables: set[str]) -> Any:
        """`value` with `Text` for strings that have stand-ins in them."""
        match value:
            case dict():
                return {key: self._with_variables(item, variables) for key, item in value.items()}
            case list():
                return [self._with_variables(item, variables) for item in value]
            case str() if self._has_stand_in(value):
                parts = self._split(value)
                variables.update(part.variable for part in parts if isinstance(part, VariablePart))
                return Text(parts)
        return value

    def _split(self, text: str) -> Parts:
        pieces = self._pattern.split(text)
        if any(map(self._has_stand_in, pieces[0::2])):
            raise NotStatic("A prompt does something to a text that a model has yet to write.")
        parts = [VariablePart(variable=s) if i % 2 else TextPart(text=s) for i, s in enumerate(pieces) if s]
        return tuple(parts)

    def _has_stand_in(self, text: str) -> bool:
        return self._nonce.casefold() in text.casefold()

    def _stand_in(self, variable: str) -> str:
        return f"{_START}{self._nonce}{variable}{_END}"


def _wire_call(call: PlannedCall) -> Call:
    """By way of JSON: the types are then those of the wire, such as string keys in logit_bias."""
    body = dict(call.body)
    if "messages" in body:
        body["messages"] = [{**message, "content": _parts(message.get("content"))} for message in body["messages"]]
    text = json.dumps({"id": call.id, "output": call.output, "request": body}, default=_dump)
    return Call.model_validate_json(text)


def _wire_join(join: Join) -> Transform:
    args = {"separator": join.separator, "strip": True, "drop_blank": True}
    return Transform(id=join.output, op="join", inputs=list(join.inputs), output=join.output, args=args)


def _parts(content: Any) -> Any:
    """Message content as the protocol has it: blocks of text are parts of one string."""
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for block in content:
        text = block.get("text") if isinstance(block, dict) else None
        parts += text.parts if isinstance(text, Text) else [block]
    return parts


def _dump(value: Any) -> Any:
    if isinstance(value, Text):
        return value.parts
    if isinstance(value, TextPart | VariablePart):
        return value.model_dump()
    raise TypeError(f"{type(value).__name__} is not JSON")

"""From a request's body to the wire types; what is wrong with it is said by path."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from macaw.errors import InvalidProgramError, InvalidRequestError, RequestError
from macaw.protocol import (
    Call,
    ChatCompletionRequest,
    CompletionRequest,
    Hints,
    Message,
    ProgramGrowth,
    ProgramRequest,
    ResponseFormat,
    StructuredOutputs,
    Target,
    Transform,
    VariablePart,
    VariableValue,
    WireModel,
)
from macaw_server.http.unsupported import find_unsupported

Model = TypeVar("Model", bound=WireModel)
OpenAIRequest = TypeVar("OpenAIRequest", ChatCompletionRequest, CompletionRequest)

_PROMPT = "a prompt is a string, a list of strings, a list of token ids, or a list of lists of token ids"
_PROMPT_IN_PROGRAM = "in a program a prompt is a string or a list of text and variable parts"
_NESTED_FIELDS = sorted(
    {
        name
        for kind in (Call, ChatCompletionRequest, Message, Transform, Target, Hints, ResponseFormat, StructuredOutputs)
        for name in kind.model_fields
    }
)
_CONTENT = "content is a string or a list of parts of type text"


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object. Reads no more than `max_bytes` whatever the headers say.

    Raises:
        InvalidRequestError: Too large (`request_too_large`), not UTF-8, not JSON, or not an object.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        _too_large(f"{int(declared):,} bytes", max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            _too_large(f"More than {max_bytes:,} bytes", max_bytes)
    try:
        parsed = json.loads(body.decode(), parse_constant=_refuse_constant)
        if rb"\ud" in body.lower():  # half a surrogate pair may be spelt, but is no text
            json.dumps(parsed, ensure_ascii=False).encode()
    except json.JSONDecodeError as e:
        seen = "is empty" if not body.strip() else f"is not valid JSON: {e.msg} at line {e.lineno} column {e.colno}"
        raise InvalidRequestError(f"The body {seen}. Send a JSON object.") from e
    except UnicodeEncodeError as e:
        raise InvalidRequestError("The body has half a surrogate pair in a string. Send valid Unicode.") from e
    except UnicodeDecodeError as e:
        raise InvalidRequestError(f"The body is not UTF-8: {e.reason} at byte {e.start:,}. Send JSON in UTF-8.") from e
    except RecursionError as e:
        raise InvalidRequestError("The body is nested too deeply. No accepted body is.") from e
    except ValueError as e:
        raise InvalidRequestError(f"The body has a number that is not accepted: {e}.") from e
    if not isinstance(parsed, dict):
        raise InvalidRequestError(f"The body is a JSON {_json_type(parsed)}. Send an object.")
    return parsed


def parse_openai(kind: type[OpenAIRequest], body: dict[str, Any]) -> OpenAIRequest:
    """A request without a program.

    Raises:
        InvalidRequestError: `unsupported_parameter` for fields of OpenAI's that are not served, else
            `invalid_request`.
    """
    for path, message in find_unsupported(body):
        raise InvalidRequestError(message, code="unsupported_parameter", param=path)
    request = _validate(kind, body, InvalidRequestError)
    variable = next((part.variable for part in request.parts if isinstance(part, VariablePart)), None)
    if variable is not None:
        raise InvalidRequestError(
            f"The prompt has a variable ({variable!r}), and a request without a program has none. Send its "
            "text, or post a program to /v1/programs.",
            param="messages" if isinstance(request, ChatCompletionRequest) else "prompt",
        )
    return request


def parse_program(body: dict[str, Any]) -> ProgramRequest:
    """A program. Raises `InvalidProgramError`."""
    _check_calls(body)
    request = _validate(ProgramRequest, body, InvalidProgramError)
    waits_for_client = request.open or any(variable.external for variable in request.variables.values())
    if waits_for_client and not request.stream:
        raise InvalidProgramError(
            "An open program, and one with external variables, waits for its client, who learns the "
            'program\'s id from its first event. Set "stream": true.',
            param="stream",
        )
    return request


def parse_growth(body: dict[str, Any]) -> ProgramGrowth:
    """A part of a program. Raises `InvalidProgramError`."""
    _check_calls(body)
    return _validate(ProgramGrowth, body, InvalidProgramError)


def parse_variable(body: dict[str, Any]) -> VariableValue:
    """A value. Raises `InvalidProgramError`."""
    return _validate(VariableValue, body, InvalidProgramError)


def _check_calls(body: dict[str, Any]) -> None:
    calls = body.get("calls")
    for i, call in enumerate(calls if isinstance(calls, list) else []):
        if isinstance(call, dict) and isinstance(request := call.get("request"), dict):
            for path, message in find_unsupported(request, f"calls[{i}].request."):
                raise InvalidProgramError(message, param=path)


def _validate(kind: type[Model], body: dict[str, Any], error: type[RequestError]) -> Model:
    try:
        return kind.model_validate(body)
    except ValidationError as e:
        path, message = _describe(e.errors(include_url=False), body, kind)
        raise error(message, param=path or None) from e


def _describe(errors: Sequence[ErrorDetails], body: dict[str, Any], kind: type[WireModel]) -> tuple[str, str]:
    """Path and message of the first field that is wrong; of a union's errors, the one that got furthest."""
    located = [(_path(error, body), error) for error in errors]
    first = located[0][0]
    path, error = max((entry for entry in located if entry[0][:1] == first[:1]), key=lambda entry: len(entry[0]))
    text = "".join(f"[{item}]" if isinstance(item, int) else f".{item}" for item in path).lstrip(".")
    field = path[-1] if path else ""
    if "prompt" in path:
        wanted = _PROMPT if kind is CompletionRequest else _PROMPT_IN_PROGRAM
        return text, f"{text}: {_shown(error['input'])} was given; {wanted}."
    if error["type"] == "field":
        return text, f"{text}: {error['ctx']['why']}."
    if error["type"] == "missing":
        return text, f"{text} is missing."
    if error["type"] == "extra_forbidden":
        known = kind.model_fields if len(path) == 1 else _NESTED_FIELDS
        close = difflib.get_close_matches(str(field), known, n=1)
        hint = f" Did you mean {close[0]}?" if close else " Leave it out."
        return text, f"{text} is not a known field.{hint}"
    same_place = (e for other, e in located if other == path)
    wanted = " or ".join(dict.fromkeys(_lowered(e["msg"].removeprefix("Value error, ")) for e in same_place))
    if field == "content" and error["type"] in ("string_type", "list_type"):
        wanted = _CONTENT
    return text, f"{text or 'The body'}: {_shown(error['input'])} was given; {wanted}."


def _path(error: ErrorDetails, body: object) -> list[str | int]:
    """Where in the body an error is: pydantic's location without the branches of unions."""
    path: list[str | int] = []
    for i, item in enumerate(error["loc"]):
        is_last = i == len(error["loc"]) - 1
        if isinstance(body, dict) and (item in body or (is_last and error["type"] in ("missing", "extra_forbidden"))):
            path.append(item)
            body = body.get(item)
        elif isinstance(body, list) and isinstance(item, int):
            path.append(item)
            body = body[item]
    if error["type"] == "field":
        path.append(error["ctx"]["field"])
    return path


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json_type(value: object) -> str:
    return {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _too_large(seen: str, max_bytes: int) -> NoReturn:
    raise InvalidRequestError(
        f"{seen} were sent; the largest accepted body has {max_bytes:,}. Send less, or serve with --max-body-size.",
        code="request_too_large",
        status=413,
    )

"""Functions to call, and what a scripted server answers to the programs that they make."""

import macaw
from macaw.protocol import (
    CallFailed,
    CallTimings,
    ErrorBody,
    ProgramCompleted,
    ProgramCreated,
    ProgramRequest,
    Totals,
    VariableResolved,
)

POST = ("POST", "/v1/programs")


@macaw.function(temperature=0, outputs={"test": {"max_tokens": 9}})
def write(task, language="Python"):
    """Write {{input:task}} in {{input:language}}. {{output:code}} Test it. {{output:test}}"""


@macaw.function
def review(code):
    """Review {{input:code}} {{output:remarks}}"""


@macaw.native_function
def shout(text):
    return text.upper()


def numbered(*events):
    for sequence, event in enumerate(events):
        event.sequence = sequence
    return list(events)


def resolved(**values):
    return [VariableResolved(variable=name.replace("__", "."), value=value) for name, value in values.items()]


def completed(*events):
    end = ProgramCompleted(program_id="p1", variables={}, critical_path=[], totals=Totals(), duration_ms=1.0)
    return numbered(ProgramCreated(program_id="p1"), *events, end)


def failed(name, message="boom", code="context_length_exceeded"):
    error = ErrorBody(message=message, type="invalid_request_error", code=code)
    return CallFailed(call_id=name, error=error, timings=CallTimings())


def refusal(error):
    return {"error": error.to_wire()}


def sent(server, index=0):
    return ProgramRequest.model_validate(server.seen[index].body)

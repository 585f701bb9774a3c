"""What makes a graph unsound, each with the path of the offending field and what to do about it.

A growth is checked by itself: an existing step never reads what a later growth brings, because unknown
variables are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from macaw.errors import InvalidProgramError
from macaw.protocol import Call, CompletionRequest, ProgramGrowth, Transform, VariablePart

from .transforms import TransformArgsError, TransformFn, compile_transform

if TYPE_CHECKING:
    from .graph import Graph

Step = Call | Transform


class Checked(NamedTuple):
    """A sound part: steps, producers before consumers; who makes each variable; the compiled transforms."""

    steps: dict[str, Step]
    producers: dict[str, str | None]
    functions: dict[str, TransformFn]


def check(graph: Graph, growth: ProgramGrowth, *, closed: bool, plain: bool) -> Checked:
    """Check a part that is to be added to `graph`, which stays as it is.

    Args:
        graph: What is there.
        growth: The part.
        closed: Nothing can be added later, so calls that no target needs are refused.
        plain: The program stands for one OpenAI request; see `Program`.

    Raises:
        InvalidProgramError: `invalid_program`, `unknown_variable` or `cycle`; `param` is the path.
    """
    _check_requests(growth, plain=plain)
    paths = _check_ids(graph, growth)
    producers = _check_producers(graph, growth)
    _check_names(graph, growth, producers)
    functions = {t.id: _compile(t, f"transforms[{i}]") for i, t in enumerate(growth.transforms)}
    steps: dict[str, Step] = {step.id: step for _, step in _steps(growth)}
    order = _topological(steps, producers, paths)
    if closed:
        _check_needed(graph, growth, steps, producers)
    return Checked({step_id: steps[step_id] for step_id in order}, producers, functions)


def inputs_of(step: Step) -> list[str]:
    """The variables that a step reads, each once, in order of first use."""
    return step.inputs if isinstance(step, Call) else list(dict.fromkeys(step.inputs))


def _check_ids(graph: Graph, growth: ProgramGrowth) -> dict[str, str]:
    """The path of every new step, by id."""
    paths: dict[str, str] = {}
    for path, step in _steps(growth):
        if step.id in paths or step.id in graph.steps:
            where = f"already used by {paths.get(step.id, 'an earlier part of the program')}"
            raise InvalidProgramError(
                f"Id {step.id!r} is {where}. Ids of calls and transforms are unique in a program.",
                param=f"{path}.id",
            )
        paths[step.id] = path
    return paths


def _check_producers(graph: Graph, growth: ProgramGrowth) -> dict[str, str | None]:
    """The producer of every new variable."""
    made: dict[str, str | None] = {}
    outputs = [(f"{path}.output", step.output, step.id) for path, step in _steps(growth)]
    for path, name, producer in [(f"variables.{name}", name, None) for name in growth.variables] + outputs:
        if name in made or name in graph.producers:
            first = made[name] if name in made else graph.producers[name]
            owner = f"by {first!r}" if first else "by the client (it is listed in variables)"
            raise InvalidProgramError(
                f"Variable {name!r} is already produced {owner}. A variable has one producer: "
                "give this output a name of its own.",
                param=path,
            )
        made[name] = producer
    return made


def _check_names(graph: Graph, growth: ProgramGrowth, producers: dict[str, str | None]) -> None:
    for path, name in _references(growth):
        if name in producers or name in graph.producers:
            continue
        close = difflib.get_close_matches(name, [*producers, *graph.producers], n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InvalidProgramError(
            f"Variable {name!r} is not in the program.{hint} Declare it in variables, or let a call or a "
            "transform produce it.",
            code="unknown_variable",
            param=path,
        )


def _check_needed(graph: Graph, growth: ProgramGrowth, new: dict[str, Step], producers: dict[str, str | None]) -> None:
    """In a closed program a call that no target needs would run for nothing."""
    pending = [t.variable for t in (*graph.targets, *growth.targets)]
    needed: set[str] = set()
    while pending:
        step_id = producers.get(pending.pop())
        if step_id is not None and step_id not in needed:
            needed.add(step_id)
            pending += inputs_of(new[step_id])
    for i, call in enumerate(growth.calls):
        if call.id not in needed:
            raise InvalidProgramError(
                f"No target needs call {call.id!r}, so it would run for nothing. Add its output "
                f"{call.output!r} to targets, leave the call out, or keep the program open.",
                param=f"calls[{i}].output",
            )


def _steps(growth: ProgramGrowth) -> Iterator[tuple[str, Step]]:
    for i, call in enumerate(growth.calls):
        yield f"calls[{i}]", call
    for i, transform in enumerate(growth.transforms):
        yield f"transforms[{i}]", transform


def _references(growth: ProgramGrowth) -> Iterator[tuple[str, str]]:
    """Every place that names a variable: (path, name)."""
    for i, call in enumerate(growth.calls):
        request, path = call.request, f"calls[{i}].request"
        if isinstance(request, CompletionRequest):
            contents = [(f"{path}.prompt", request.parts)]
        else:
            contents = [(f"{path}.messages[{j}].content", m.parts) for j, m in enumerate(request.messages)]
        for prefix, parts in contents:
            for j, part in enumerate(parts):
                if isinstance(part, VariablePart):
                    yield f"{prefix}[{j}].variable", part.variable
    for i, transform in enumerate(growth.transforms):
        for j, name in enumerate(transform.inputs):
            yield f"transforms[{i}].inputs[{j}]", name
    for i, target in enumerate(growth.targets):
        yield f"targets[{i}].variable", target.variable


def _check_requests(growth: ProgramGrowth, *, plain: bool) -> None:
    """Refuse, by name, what a request cannot say inside a program."""
    for i, call in enumerate(growth.calls):
        request, path = call.request, f"calls[{i}].request"
        if isinstance(request, CompletionRequest) and isinstance(request.prompt, list):
            first = request.prompt[0]
            if isinstance(first, str | list):
                raise InvalidProgramError(
                    f"Call {call.id!r} has a list of {len(request.prompt)} prompts, but one output. Give "
                    "each prompt a call of its own.",
                    param=f"{path}.prompt",
                )
            if isinstance(first, int) and not plain:
                raise InvalidProgramError(
                    f"Call {call.id!r} has a prompt of token ids. In a program a prompt is a string or a "
                    "list of text and variable parts; send token ids to /v1/completions.",
                    param=f"{path}.prompt",
                )
        for name, remedy in () if plain else _NOT_IN_A_PROGRAM:
            if getattr(request, name) is not None:
                raise InvalidProgramError(
                    f"Call {call.id!r} sets {name}, which a call inside a program does not take: {remedy}.",
                    param=f"{path}.{name}",
                )


_NOT_IN_A_PROGRAM = (
    ("stream", "streaming is the program's own field, for all of its calls"),
    ("stream_options", "a program's events always carry the usage"),
    ("macaw", "hints are for requests without a program; here the graph and its targets say it"),
)


def _compile(transform: Transform, path: str) -> TransformFn:
    try:
        return compile_transform(transform)
    except TransformArgsError as e:
        raise InvalidProgramError(
            f"Transform {transform.id!r} ({transform.op}) cannot work. {e}", param=f"{path}.args.{e.arg}"
        ) from e


def _topological(new: dict[str, Step], producers: dict[str, str | None], paths: dict[str, str]) -> list[str]:
    """Kahn's algorithm over the new steps; what is left over holds a cycle."""
    sources = {step_id: [p for v in inputs_of(step) if (p := producers.get(v))] for step_id, step in new.items()}
    missing = {step_id: len(steps) for step_id, steps in sources.items()}
    consumers: dict[str, list[str]] = {step_id: [] for step_id in new}
    for step_id, steps in sources.items():
        for source in steps:
            consumers[source].append(step_id)
    order = [step_id for step_id, count in missing.items() if count == 0]
    for step_id in order:  # grows while it is walked
        for consumer in consumers[step_id]:
            missing[consumer] -= 1
            if missing[consumer] == 0:
                order.append(consumer)
    if len(order) < len(new):
        cycle = _find_cycle({step_id: sources[step_id] for step_id in new if missing[step_id]})
        raise InvalidProgramError(
            f"The graph has a cycle: {' -> '.join(cycle)}. Each step needs the one before it, so none can "
            "start; write a loop as an open program that grows by one round at a time.",
            code="cycle",
            param=paths[cycle[0]],
        )
    return order


def _find_cycle(sources: dict[str, list[str]]) -> list[str]:
    """A cycle among steps that each wait for another one of them, from producer to consumer, ends equal."""
    step_id = next(iter(sources))
    walk: dict[str, None] = {}
    while step_id not in walk:
        walk[step_id] = None
        step_id = next(source for source in sources[step_id] if source in sources)
    steps = list(walk)
    cycle = steps[steps.index(step_id) :]
    return [cycle[0], *reversed(cycle)]

"""The nouns of a workload: a program, its calls, the parts of their prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Text(NamedTuple):
    """A text that the application knows: the same key is the same text, wherever it appears.

    Attributes:
        key: Its name, all over the workload.
        length: Tokens.
    """

    key: str
    length: int


class Output(NamedTuple):
    """The whole answer to another call of the program."""

    call: str


Part = Text | Output


@dataclass(frozen=True, slots=True)
class CallSpec:
    """One call.

    Attributes:
        id: Within its program.
        parts: The prompt, in order.
        output_len: Tokens of the answer.
        after: Calls that it waits for without reading them.
        gap_s: Time that the client spends (a tool, a person) between the answers that the call waits for and the
            call: the server learns of such a call only then.
    """

    id: str
    parts: tuple[Part, ...]
    output_len: int
    after: tuple[str, ...] = ()
    gap_s: float = 0.0

    @property
    def deps(self) -> tuple[str, ...]:
        """Calls that it waits for, each once."""
        return tuple(dict.fromkeys([*(p.call for p in self.parts if isinstance(p, Output)), *self.after]))


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """One run of an application.

    Attributes:
        id: Within the workload.
        app: Programs of one app are reported together.
        arrival_s: From the start of the workload.
        calls: Producers before consumers.
        targets: Calls whose answers the application waits for, all of them.
        objective: How.
        deadline_s: From the arrival; None is no deadline.
        tenant: Whose.
        tenant_weight: See `CallHints`; the same in all programs of a tenant.
    """

    id: str
    app: str
    arrival_s: float
    calls: tuple[CallSpec, ...]
    targets: tuple[str, ...]
    objective: Literal["latency", "throughput"] = "latency"
    deadline_s: float | None = None
    tenant: str = "t0"
    tenant_weight: float = 1.0

    def prompt_lens(self) -> dict[str, int]:
        """Tokens of each call's prompt, by id."""
        outputs = {call.id: call.output_len for call in self.calls}
        return {
            call.id: sum(p.length if isinstance(p, Text) else outputs[p.call] for p in call.parts)
            for call in self.calls
        }

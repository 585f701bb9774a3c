"""Applications that send ordinary requests with hints: those of one `app` are shown as one program."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from macaw.protocol import CallState, CallTimings, Hints, ProgramState, Totals
from macaw_server.programs.program import Program
from macaw_server.service.types import ServiceConfig, Tenant


def application_id(tenant: Tenant, app: str) -> str:
    """The id of the program that a tenant's requests with this `app` are; it says nothing about either."""
    digest = hashlib.sha256(f"{tenant.id}\0{app}".encode()).hexdigest()
    return f"app-{digest[:32]}"


@dataclass(slots=True)
class _Request:
    """A live request: the number that it has in its application, and its program of one call (or several)."""

    number: int
    program: Program
    hints: Hints
    start_ms: float

    def states(self) -> Iterator[CallState]:
        """Its calls as the application's. What they said is not repeated."""
        calls = list(self.program.calls.values())
        for i, node in enumerate(calls):
            call_id = str(self.number) if len(calls) == 1 else f"{self.number}.{i}"
            update = {
                "id": call_id,
                "output": call_id,
                "depth": self.hints.stage or 0,
                "group": self.hints.group,
                "group_size": self.hints.group_size,
                "timings": _later(node.timings, self.start_ms),
                "completion": None,
            }
            yield node.state().model_copy(update=update)


@dataclass(slots=True)
class Application:
    """The requests of one `app`.

    Attributes:
        id: As of a program.
        app: What the client calls it.
        started_s: The first request's start; all times count from here. Monotonic seconds.
        last_s: When something happened last.
    """

    id: str
    app: str
    started_s: float
    last_s: float
    max_calls: int
    _model: str = ""
    _num_requests: int = 0
    _live: dict[str, _Request] = field(default_factory=dict)
    _ended: deque[CallState] = field(default_factory=deque)
    _totals: Totals = field(default_factory=Totals)

    @property
    def live_programs(self) -> list[str]:
        """Ids of the programs that its unfinished requests are."""
        return list(self._live)

    @property
    def num_calls(self) -> int:
        """Finished calls that are remembered."""
        return len(self._ended)

    def begin(self, program: Program, hints: Hints, now_s: float) -> None:
        """A request has come."""
        self._live[program.id] = _Request(self._num_requests, program, hints, (now_s - self.started_s) * 1000)
        self._model = program.request.model or self._model
        self._num_requests += 1
        self.last_s = now_s

    def end(self, program_id: str, now_s: float) -> None:
        """A request is done; of many, those that ended last are remembered."""
        request = self._live.pop(program_id)
        self._ended.extend(request.states())
        while len(self._ended) > self.max_calls:
            self._ended.popleft()
        self._totals = _sum(self._totals, request.program.state(0.0).totals)
        self.last_s = now_s

    def state(self, now_s: float) -> ProgramState:
        """What the client is told: its calls, finished ones first. It has no targets, for no one knows its end."""
        live = [state for request in self._live.values() for state in request.states()]
        totals = self._totals
        for request in self._live.values():
            totals = _sum(totals, request.program.state(0.0).totals)
        until_s = now_s if live else self.last_s
        return ProgramState(
            id=self.id,
            status="running" if live else "completed",
            model=self._model,
            calls=[*self._ended, *live],
            transforms=[],
            targets=[],
            variables={},
            critical_path=[],
            totals=totals,
            duration_ms=(until_s - self.started_s) * 1000,
            metadata={"app": self.app},
        )


class Applications:
    """Those of all tenants. Each tenant has its own bound, so that none can make another's be forgotten.

    Args:
        config: `max_kept_programs`, `max_app_calls` and `kept_s`.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._by_tenant: dict[str, OrderedDict[str, Application]] = {}  # by id; the least recent first

    def begin(self, tenant: Tenant, program: Program, hints: Hints) -> None:
        """A request has come; one without an `app` stands for itself."""
        if hints.app is None:
            return
        now_s, id_ = time.monotonic(), application_id(tenant, hints.app)
        apps = self._by_tenant.setdefault(tenant.id, OrderedDict())
        if id_ not in apps:
            apps[id_] = Application(id_, hints.app, now_s, now_s, self._config.max_app_calls)
        apps[id_].begin(program, hints, now_s)
        apps.move_to_end(id_)
        self._forget_old(apps)

    def end(self, tenant: Tenant, program: Program, hints: Hints) -> None:
        """A request is done."""
        if hints.app is None:
            return
        apps, id_ = self._by_tenant[tenant.id], application_id(tenant, hints.app)
        apps[id_].end(program.id, time.monotonic())
        apps.move_to_end(id_)

    def find(self, tenant: Tenant, id_: str) -> Application | None:
        """One of this tenant's that is remembered."""
        apps = self._by_tenant.get(tenant.id, OrderedDict())
        self._forget_old(apps)
        return apps.get(id_)

    def of(self, tenant: Tenant) -> list[Application]:
        """All of this tenant's that are remembered."""
        apps = self._by_tenant.get(tenant.id, OrderedDict())
        self._forget_old(apps)
        return list(apps.values())

    def _forget_old(self, apps: OrderedDict[str, Application]) -> None:
        """Drop what is idle and over the bounds. There are as many live ones as there may be live requests."""
        too_old_s = time.monotonic() - self._config.kept_s
        num_calls = sum(app.num_calls for app in apps.values())
        for app in [app for app in apps.values() if not app.live_programs]:
            too_many = len(apps) > self._config.max_kept_programs or num_calls > self._config.max_app_calls
            if too_many or app.last_s < too_old_s:
                del apps[app.id]
                num_calls -= app.num_calls
            else:
                return


def _later(timings: CallTimings, by_ms: float) -> CallTimings:
    """Times of a request, counted from the application's start."""
    names = ("ahead_ms", "ready_ms", "started_ms", "first_token_ms", "completed_ms")
    shifted = {name: getattr(timings, name) + by_ms for name in names if getattr(timings, name) is not None}
    return timings.model_copy(update=shifted)


def _sum(*totals: Totals) -> Totals:
    return Totals(**{name: sum(getattr(one, name) for one in totals) for name in Totals.model_fields})


def states(applications: Iterable[Application]) -> list[ProgramState]:
    """What the client is told of each, now."""
    now_s = time.monotonic()
    return [application.state(now_s) for application in applications]

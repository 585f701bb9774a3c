"""All programs of a server: accepting, finding, forgetting and draining them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from macaw.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
)
from macaw.protocol import (
    Call,
    ChatCompletionRequest,
    CompletionRequest,
    Hints,
    ProgramGrowth,
    ProgramRequest,
    ProgramState,
    Tokens,
    Variable,
)
from macaw_server.programs.program import Program
from macaw_server.service.admission import Admission
from macaw_server.service.ahead import AheadService
from macaw_server.service.applications import Applications, states
from macaw_server.service.metrics import Metrics
from macaw_server.service.models import ModelRegistry
from macaw_server.service.pace import Pace
from macaw_server.service.program_run import ProgramRun, Surroundings, weight
from macaw_server.service.prompts import PromptPreparer
from macaw_server.service.tenants import Tenants
from macaw_server.service.traces import Traces
from macaw_server.service.types import ServedModel, ServiceConfig, Tenant


class _Keyed(NamedTuple):
    """A program that was posted with an idempotency key."""

    fingerprint: bytes
    creation: asyncio.Task[ProgramRun]

    @property
    def was_cancelled(self) -> bool:
        """Whether its program ended because its client left or wanted it to."""
        if not self.creation.done() or self.creation.cancelled() or self.creation.exception() is not None:
            return False
        error = self.creation.result().program.error
        return error is not None and error.code == "cancelled"


class ProgramService:
    """Runs programs on engines that have been started. One per event loop.

    Args:
        models: What is served.
        config: Limits.
        secret: From which the tenants' cache salts are derived; random by default.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        config: ServiceConfig | None = None,
        *,
        secret: bytes | None = None,
    ) -> None:
        self.config = config or ServiceConfig()
        self.models = ModelRegistry(models)
        self.tenants = Tenants(self.config.api_keys, self.config.tenants, secret)
        self.metrics = Metrics(lambda: len(self._live), lambda: self.num_live_calls)
        self.traces = Traces()
        self._admission = Admission(self.config.max_live_calls, shared=len(self.tenants) > 1)
        self._pace = Pace()
        self._applications = Applications(self.config)
        self._surroundings = Surroundings(
            self.config,
            PromptPreparer(self.models),
            self.metrics,
            AheadService(self.models),
            self._admission,
            self._pace,
            self.traces,
            self._on_end,
        )
        self._live: dict[str, ProgramRun] = {}
        self._kept: dict[str, tuple[ProgramRun, float]] = {}  # finished, and when; oldest first
        self._keyed: dict[tuple[str, str], _Keyed] = {}
        self._num_kept_events = 0
        self._all_ended = asyncio.Event()
        self._draining = False

    @property
    def num_live_calls(self) -> int:
        """Unfinished calls of all programs; one with `n` choices counts `n` times."""
        return self._admission.num_live

    @property
    def draining(self) -> bool:
        """Whether new programs are refused because the server is about to end."""
        return self._draining

    async def submit(self, tenant: Tenant, request: ProgramRequest, *, hints: Hints | None = None) -> ProgramRun:
        """Check a program as a whole and start it, or join the one that has its idempotency key.

        Args:
            tenant: Whose it is.
            request: The program.
            hints: Given (perhaps empty) where the program stands for an OpenAI request; it is not kept then,
                for nobody knows its id.

        Raises:
            RequestError: Something is wrong with it; nothing has started.
            OverloadedError: Too many calls are live, or the server is about to end.
            DeadlineExceededError: Its deadline cannot be met.
            EngineFailedError: The model's engine is gone.
        """
        self._forget_old()
        key = request.idempotency_key
        if key is None:
            return await self._create(tenant, request, hints)
        fingerprint = hashlib.sha256(request.model_dump_json().encode()).digest()
        keyed = self._keyed.get((tenant.id, key))
        if keyed is None or keyed.was_cancelled:  # a client that lost its connection and tries again
            creation = asyncio.create_task(self._create(tenant, request, hints))
            keyed = self._keyed[tenant.id, key] = _Keyed(fingerprint, creation)
        elif keyed.fingerprint != fingerprint:
            raise InvalidRequestError(
                f"Idempotency key {key!r} was used for another body. Send the same body again, or a new key.",
                param="idempotency_key",
            )
        try:
            return await asyncio.shield(keyed.creation)
        except Exception:
            if self._keyed.get((tenant.id, key)) is keyed:  # a second try may go well
                del self._keyed[tenant.id, key]
            raise

    async def grow(self, run: ProgramRun, growth: ProgramGrowth) -> None:
        """Add to a program: all of it, or nothing and an error."""
        values = run.values | _declared(growth.variables)
        model = run.program.request.model
        with self._admitted(run.tenant, growth.calls):
            prepared = await self._surroundings.preparer.prepare_known(growth.calls, values, model, plain=False)
            run.grow(growth, prepared)

    def get(self, tenant: Tenant, program_id: str) -> ProgramRun:
        """A live or finished program.

        Raises:
            NotFoundError: There is none of this tenant's.
        """
        self._forget_old()
        run = self._live.get(program_id)
        if run is None and program_id in self._kept:
            run = self._kept[program_id][0]
        if run is None or run.tenant != tenant:
            raise NotFoundError(
                f"No program {program_id!r}. It never was, is another API key's, or ended more than "
                f"{self.config.kept_s:g} s or {self.config.max_kept_programs} programs ago."
            )
        return run

    def state(self, tenant: Tenant, program_id: str) -> ProgramState:
        """The state of a program, or of an application whose requests are one by their hints.

        Raises:
            NotFoundError: There is none of this tenant's.
        """
        if (application := self._applications.find(tenant, program_id)) is not None:
            return states([application])[0]
        return self.get(tenant, program_id).state

    def states(self, tenant: Tenant) -> Sequence[ProgramState]:
        """All of the tenant's programs, the longest remembered first; then applications, the latest last."""
        in_app = {id_ for app in self._applications.of(tenant) for id_ in app.live_programs}
        programs = [run.state for run in self.list(tenant) if run.id not in in_app]
        return [*programs, *states(self._applications.of(tenant))]

    def cancel(self, tenant: Tenant, program_id: str, error: CancelledError) -> None:
        """End a program, or what an application has running; one that has ended stays as it is.

        Raises:
            NotFoundError: There is none of this tenant's.
        """
        application = self._applications.find(tenant, program_id)
        for id_ in [program_id] if application is None else application.live_programs:
            self.get(tenant, id_).cancel(error)

    def list(self, tenant: Tenant) -> list[ProgramRun]:
        """The tenant's programs, oldest first."""
        self._forget_old()
        runs = [*(run for run, _ in self._kept.values()), *self._live.values()]
        return sorted((run for run in runs if run.tenant == tenant), key=lambda run: run.started_s)

    async def drain(self, timeout_s: float) -> None:
        """Take no new programs; let those that run end, and cancel what is left after `timeout_s`."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._live:
                    self._all_ended.clear()
                    await self._all_ended.wait()
        for run in list(self._live.values()):
            run.cancel(CancelledError("The server is shutting down. Post the program again when it is back."))
        self.traces.close()

    async def close(self) -> None:
        """Cancel everything and end the threads; the engines are their owner's to stop."""
        await self.drain(0)
        self._surroundings.preparer.close()
        self._surroundings.ahead.close()

    async def tokenize(self, request: ChatCompletionRequest | CompletionRequest) -> Tokens:
        """The prompt of a request as its model would see it. Raises `RequestError`."""
        model, tokens = await self._surroundings.preparer.tokenize(request)
        return Tokens(count=len(tokens), max_model_len=model.engine.info.max_model_len, tokens=tokens)

    def check_room(self, tenant: Tenant) -> None:
        """Whether one more call would be taken, asked before a body is read; raises `OverloadedError`."""
        self._check_draining()
        self._admission.check(tenant, 1)

    async def _create(self, tenant: Tenant, request: ProgramRequest, hints: Hints | None) -> ProgramRun:
        self._check_draining()
        with self._admitted(tenant, request.calls):
            return await self._start(tenant, request, hints)

    async def _start(self, tenant: Tenant, request: ProgramRequest, hints: Hints | None) -> ProgramRun:
        plain = hints is not None
        if request.model is not None or len(self.models) == 1:
            request = request.model_copy(update={"model": self.models.find(request.model).name})
        program = Program(f"prog-{secrets.token_hex(16)}", request, plain=plain)
        prepared = await self._surroundings.preparer.prepare_known(
            request.calls, _declared(request.variables), request.model, plain=plain
        )
        self._check_draining()
        run = ProgramRun(program, tenant, self._surroundings, prepared, hints)
        self._check_deadline(run)
        self._live[run.id] = run
        if hints is not None:
            self._applications.begin(tenant, program, hints)
        run.start()
        return run

    def _check_draining(self) -> None:
        if self._draining:
            raise OverloadedError(
                "The server is shutting down and takes no new programs. Try again when it is back.",
                status=503,
                retry_after_s=5.0,
            )

    @contextlib.contextmanager
    def _admitted(self, tenant: Tenant, new: Sequence[Call]) -> Iterator[None]:
        """Count calls as live from now on, unless what is done within fails."""
        num_new = sum(map(weight, new))
        self._admission.begin(tenant, num_new)
        try:
            yield
        except BaseException:
            self._admission.end(tenant, num_new, served=False)
            raise

    def _check_deadline(self, run: ProgramRun) -> None:
        """Refuse a program that cannot be done in time, however lucky it is."""
        slack = run.program.slack(run.least_ms)
        if slack is None:
            return
        classes = {node.call_class for node in run.program.calls.values() if node.status == "ready"}
        queue_ms = min((self._pace.queue_ms(run.tenant.id, call_class) for call_class in classes), default=0.0)
        if queue_ms + slack.needed_ms > slack.deadline_ms:
            raise DeadlineExceededError(
                f"The deadline of {slack.deadline_ms:g} ms cannot be met: at the pace that was measured it takes at "
                f"least {queue_ms + slack.needed_ms:.1f} ms, {queue_ms:.1f} of them in the queue. Allow more time, or "
                "ask for less."
            )

    def _on_end(self, run: ProgramRun) -> None:
        del self._live[run.id]
        if not self._live:
            self._all_ended.set()
        if run.hints is not None:
            self._applications.end(run.tenant, run.program, run.hints)
        else:
            self._kept[run.id] = run, time.monotonic()
            self._num_kept_events += len(run.program.events)
            self._forget_old()

    def _forget_old(self) -> None:
        """Drop finished programs over the bounds, oldest first, and their idempotency keys with them."""
        config = self.config
        for run, ended_s in list(self._kept.values()):
            too_many = len(self._kept) > config.max_kept_programs
            too_large = self._num_kept_events > config.max_kept_events and len(self._kept) > 1
            if not (too_many or too_large or time.monotonic() - ended_s > config.kept_s):
                return
            del self._kept[run.id]
            self._num_kept_events -= len(run.program.events)
            if (key := run.program.request.idempotency_key) is not None:
                self._keyed.pop((run.tenant.id, key), None)


def _declared(variables: Mapping[str, Variable]) -> dict[str, str]:
    return {name: variable.value for name, variable in variables.items() if variable.value is not None}

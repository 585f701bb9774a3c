"""Prefill ahead and pipelining: the prompts of calls to come warm the cache as far as they are known.

What is asked of the engine here is of class AHEAD: it yields to every call, and a call finds in the cache whatever
of its own prompt was right.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, zip_longest

from macaw.errors import MacawError
from macaw.protocol import CallCompleted, CallFailed, Event, VariableResolved
from macaw_server.engine.types import CallClass, CallHints, EngineOutput, EngineRequest, SamplingParams
from macaw_server.programs.ahead import KnownPrompt, known_prompt, stable_tokens
from macaw_server.programs.calls import Ahead, CallNode
from macaw_server.programs.program import Program
from macaw_server.service.models import ModelRegistry
from macaw_server.service.types import ServedModel

log = logging.getLogger(__name__)

MAX_REQUESTS = 64
"""At work or waiting in all engines together; beyond, nothing is asked for."""
MAX_CALLS = 8
"""Of one program at one time."""
MIN_NEW_TOKENS = 32
"""Of an answer, after which its consumer's prompt is looked at again; more when the prompt is long (`_GROWTH`), so that
all looks together take time linear in its length."""
_GROWTH = 64
MIN_PREFIX_TOKENS = 64
"""Shorter ones are not asked for: whatever stops the engine, what it has computed of a last page is lost."""
_MIN_SAMPLE_TOKENS = 64
_RETRY_S = 0.01
"""How long after a call has ended others hear of the room: the calls that read its answer come first."""


@dataclass(slots=True, eq=False)
class AheadRequest:
    """A prefix that an engine is asked to compute, for all calls that begin with it.

    Attributes:
        model: Whose.
        request_id: The engine's.
        key: Model, salt and tokens.
        token_ids: Full pages.
        start_s: When the engine took it into a batch, monotonic seconds.
        cached_tokens: How much was there by then.
        ended: Whether the engine is done with it.
        users: Whom to tell when it has ended.
    """

    model: ServedModel
    request_id: str
    key: tuple[str, str, bytes]
    token_ids: list[int]
    start_s: float | None = None
    cached_tokens: int = 0
    ended: bool = False
    users: dict[object, Callable[[], None]] = field(default_factory=dict)


class AheadService:
    """What all programs share: the requests that are under way (single flight), a thread, and the rate of prefills.

    Args:
        models: What is served.
    """

    def __init__(self, models: ModelRegistry) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="macaw-ahead")
        self._models = models
        self._requests: dict[tuple[str, str, bytes], AheadRequest] = {}
        self._num_requests = 0
        self._num_at_work = Counter[str]()
        self._deferred: dict[str, dict[object, Callable[[], None]]] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._ms_per_token: deque[float] = deque(maxlen=32)

    @property
    def num_live(self) -> int:
        """Requests under way."""
        return len(self._requests)

    def find_working(self, name: str | None) -> ServedModel:
        """The model for a call; see `ModelRegistry.find_working`."""
        return self._models.find_working(name)

    def has_room(self, model: ServedModel) -> bool:
        """Whether the engine would do anything ahead now: beside few calls, or while there is none."""
        num_calls = model.engine.num_live - self._num_at_work[model.name]
        return num_calls < max(1, model.engine.info.ahead_rows)

    def defer(self, model: ServedModel, user: object, again: Callable[[], None]) -> None:
        """Call back once when there is room; who waits already stays where it is."""
        self._deferred.setdefault(model.name, {})[user] = again

    def forget(self, user: object) -> None:
        """Do not call back."""
        for waiting in self._deferred.values():
            waiting.pop(user, None)

    def on_end(self) -> None:
        """A call has ended, or what was asked for here: there may be room."""
        if self._retry is None and any(self._deferred.values()):
            self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self._resume)

    def submit(
        self, model: ServedModel, salt: str, token_ids: list[int], user: object, on_end: Callable[[], None]
    ) -> AheadRequest | None:
        """Ask for a prefix, or join who does already; None where there is too much under way."""
        key = model.name, salt, array("L", token_ids).tobytes()
        if (request := self._requests.get(key)) is not None:
            request.users[user] = on_end
            return request
        if len(self._requests) >= MAX_REQUESTS:
            return None
        self._num_requests += 1
        request = AheadRequest(model, f"ahead/{self._num_requests}", key, token_ids, users={user: on_end})
        self._requests[key] = request
        self._num_at_work[model.name] += 1
        hints = CallHints(call_class=CallClass.AHEAD, arrival_s=time.monotonic())
        model.engine.submit(
            EngineRequest(
                request.request_id, token_ids, SamplingParams(max_tokens=1), salt=salt, hints=hints, prefill_only=True
            ),
            lambda output: self._on_output(request, output),
        )
        return request

    def release(self, request: AheadRequest, user: object, *, keep_pages: bool) -> None:
        """One user less; without any the engine stops, and what it has computed by then stays or goes.

        What it has computed as a whole is kept as long as there is a user, as far as pages are not needed.
        """
        request.users.pop(user, None)
        if request.users:
            return
        if request.ended:
            request.model.engine.let_go([request.request_id])
        else:
            self._end(request)
            request.model.engine.abort([request.request_id], keep_pages=keep_pages)

    def observe_prefill(self, num_tokens: int, duration_ms: float) -> None:
        """Note how long a call that computed so many tokens waited for its first one."""
        if num_tokens >= _MIN_SAMPLE_TOKENS:
            self._ms_per_token.append(duration_ms / num_tokens)

    def estimate_ms(self, num_tokens: int) -> float:
        """What computing so many tokens takes, at the rate of the quickest of the last calls: the least disturbed."""
        return num_tokens * min(self._ms_per_token, default=0.0)

    def close(self) -> None:
        """End the thread."""
        if self._retry is not None:
            self._retry.cancel()
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _resume(self) -> None:
        self._retry = None
        for name, waiting in list(self._deferred.items()):
            model = self._models.find(name)
            for user in list(islice(waiting, MAX_REQUESTS - len(self._requests))) if self.has_room(model) else ():
                waiting.pop(user)()

    def _on_output(self, request: AheadRequest, output: EngineOutput) -> None:
        if output.cached_tokens is not None and request.start_s is None:
            request.start_s, request.cached_tokens = time.monotonic(), output.cached_tokens
        if output.finish_reason is not None or output.error is not None:
            self._end(request)
            for on_end in list(request.users.values()):
                on_end()

    def _end(self, request: AheadRequest) -> None:
        request.ended = True
        del self._requests[request.key]
        self._num_at_work[request.model.name] -= 1
        self.on_end()


@dataclass(slots=True, eq=False)
class _Prompt:
    """A call to come.

    Attributes:
        node: The call.
        source: The call whose answer its prompt waits for first, if one is at work on that.
        known: As of the last look.
        num_new: Tokens of the source's answer since then.
        looking: A look is under way, or cannot be any more.
        request: What was asked for last, and may be under way.
        computed: The longest prefix that an engine took into a batch.
        start_s: When it took the first one.
        cached_tokens: How much was there by then.
    """

    node: CallNode
    source: str | None = None
    known: KnownPrompt | None = None
    num_new: int = 0
    looking: bool = False
    request: AheadRequest | None = None
    computed: list[int] = field(default_factory=list)
    start_s: float | None = None
    cached_tokens: int = 0

    @property
    def busy(self) -> bool:
        """Whether nothing more is to be asked for now."""
        return self.looking or (self.request is not None and not self.request.ended)

    def note(self) -> None:
        """Take over what is known of the last request."""
        request = self.request
        if request is None or request.start_s is None:
            return
        self.computed = request.token_ids
        if self.start_s is None:
            self.start_s, self.cached_tokens = request.start_s, request.cached_tokens


class ProgramAhead:
    """Warms the cache for one program. Belongs to the event loop; tokenising happens in the service's thread.

    Args:
        service: What programs share.
        program: The program; not changed here.
        salt: The tenant's cache namespace.
        started_s: What the program's times count from, monotonic seconds.
        answer_so_far: The text of a call that is at work; None leaves out pipelining.
    """

    def __init__(
        self,
        service: AheadService,
        program: Program,
        salt: str,
        started_s: float,
        answer_so_far: Callable[[str], str] | None,
    ) -> None:
        self._service = service
        self._program = program
        self._salt = salt
        self._started_s = started_s
        self._answer_so_far = answer_so_far
        self._prompts: dict[str, _Prompt] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, producers: Iterable[str] | None = None) -> None:
        """Look at the calls that come next: after these, which are at work now, or of all of the program."""
        for node in self._program.next_calls(producers):
            if len(self._prompts) >= MAX_CALLS:
                return
            if node.call.id not in self._prompts:
                self._prompts[node.call.id] = prompt = _Prompt(node)
                self._look(prompt)

    def on_token(self, producer: str) -> None:
        """A piece of an answer came: look again at what waits for it, every so often."""
        if self._answer_so_far is None:
            return
        for prompt in self._prompts.values():
            if prompt.source == producer:
                prompt.num_new += 1
                self._look_again(prompt)

    def observe(self, events: Iterable[Event]) -> None:
        """Follow up on what happened: prompts that wait for several variables are known further with each."""
        for event in events:
            match event:
                case VariableResolved(variable=name):
                    concerned = [p for p in self._prompts.values() if name in p.node.call.inputs]
                case CallCompleted(call_id=call_id):
                    concerned = [p for p in self._prompts.values() if p.source == call_id]
                case CallFailed(call_id=call_id):
                    self.drop(call_id)
                    continue
                case _:
                    continue
            for prompt in concerned:
                if not prompt.busy:
                    self._look(prompt)

    def started(self, call_id: str, prompt_ids: list[int], cached_tokens: int) -> Ahead | None:
        """The engine has taken a call into a batch: what was prefilled ahead of that. Nothing more will be."""
        prompt = self._prompts.get(call_id)
        self.drop(call_id, keep_pages=True)
        if prompt is None or prompt.start_s is None:
            return None
        num_tokens = min(cached_tokens, _num_common(prompt.computed, prompt_ids)) - prompt.cached_tokens
        if num_tokens <= 0:
            return None
        start_ms = (prompt.start_s - self._started_s) * 1000
        return Ahead(start_ms, num_tokens, self._service.estimate_ms(num_tokens))

    def drop(self, call_id: str, *, keep_pages: bool = False) -> None:
        """The call needs nothing more; or it runs, and goes on from what is there."""
        if (prompt := self._prompts.pop(call_id, None)) is not None:
            self._service.forget(prompt)
            prompt.note()
            if prompt.request is not None:
                self._service.release(prompt.request, prompt, keep_pages=keep_pages)

    def close(self) -> None:
        """The program has ended."""
        for task in self._tasks:
            task.cancel()
        for call_id in list(self._prompts):
            self.drop(call_id)

    def _look_again(self, prompt: _Prompt) -> None:
        num_known = 0 if prompt.known is None else len(prompt.known.token_ids)
        if not prompt.busy and prompt.num_new >= max(MIN_NEW_TOKENS, num_known // _GROWTH):
            self._look(prompt)

    def _look(self, prompt: _Prompt) -> None:
        """Find out how far a prompt is known, and ask the engine for that."""
        if prompt.node.status != "waiting":
            return
        try:
            model = self._service.find_working(prompt.node.call.request.model or self._program.request.model)
        except MacawError:
            prompt.looking = True  # the call itself will say what is wrong
            return
        prompt.num_new = 0
        if not self._service.has_room(model):
            self._service.defer(model, prompt, lambda: self._look(prompt))
            return
        self._service.forget(prompt)
        inputs, prompt.source = self._program.known_inputs(prompt.node, self._answer_so_far or _nothing)
        prompt.looking = True
        task = asyncio.get_running_loop().create_task(self._ask(prompt, model, inputs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, prompt: _Prompt, model: ServedModel, inputs: dict[str, str]) -> None:
        call, info = prompt.node.call, model.engine.info
        try:
            prompt.known = await asyncio.get_running_loop().run_in_executor(
                self._service.thread,
                known_prompt,
                call.request,
                inputs,
                model.tokenizer,
                prompt.known,
                info.max_model_len,
            )
        except MacawError:
            return  # the call itself will say what is wrong
        except Exception:
            log.exception("prefilling call %s of program %s ahead", call.id, self._program.id)
            return
        if self._prompts.get(call.id) is not prompt or prompt.node.status != "waiting":
            return
        prompt.looking = False
        token_ids = stable_tokens(prompt.known, info.page_size, info.max_model_len - 1)
        if len(token_ids) >= (MIN_PREFIX_TOKENS if prompt.request is None else len(prompt.request.token_ids) + 1):
            prompt.note()
            request = self._service.submit(model, self._salt, token_ids, prompt, lambda: self._look_again(prompt))
            prompt.request = request or prompt.request


def _nothing(call_id: str) -> str:
    return ""


def _num_common(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    if first == second[: len(first)]:
        return len(first)
    return next(i for i, (a, b) in enumerate(zip_longest(first, second)) if a != b)

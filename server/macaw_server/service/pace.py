"""The least time that calls take, from the fastest that has been measured: what no schedule can undercut."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

from macaw.protocol import CallCompleted, ChatCompletionRequest, CompletionRequest
from macaw_server.engine.types import CallClass
from macaw_server.service.sampling import requested_max_tokens

AnyRequest = ChatCompletionRequest | CompletionRequest
MARGIN = 0.5
"""Of the fastest that was seen is what is believed possible."""
_MIN_TOKENS = 8
"""Shorter answers tell nothing of the time per token."""
_QUEUE_WINDOW_S = 10.0
_MIN_STARTS = 3


class Pace:
    """Lower estimates, 0 where nothing was measured yet. Times are in milliseconds.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_token: dict[str, float] = {}
        self._token: dict[str, float] = {}
        self._starts: defaultdict[tuple[str, CallClass], deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=64)
        )

    def started(self, tenant_id: str, call_class: CallClass, queue_ms: float) -> None:
        """A call entered a batch after it has waited."""
        self._starts[tenant_id, call_class].append((self._clock(), queue_ms))

    def completed(self, event: CallCompleted) -> None:
        """A call came to its end; those with several choices run side by side and tell nothing."""
        model, t = event.completion["model"], event.timings
        num_tokens, num_choices = event.completion["usage"]["completion_tokens"], len(event.completion["choices"])
        if t.ready_ms is None or t.first_token_ms is None or t.completed_ms is None or num_choices > 1:
            return
        _lower(self._first_token, model, t.first_token_ms - t.ready_ms)
        if num_tokens >= _MIN_TOKENS:
            _lower(self._token, model, (t.completed_ms - t.first_token_ms) / (num_tokens - 1))

    def queue_ms(self, tenant_id: str, call_class: CallClass) -> float:
        """What even the luckiest of this tenant's calls of this class has waited in the last seconds."""
        starts = self._starts.get((tenant_id, call_class), ())
        recent = [queue_ms for at_s, queue_ms in starts if at_s >= self._clock() - _QUEUE_WINDOW_S]
        return MARGIN * min(recent) if len(recent) >= _MIN_STARTS else 0.0

    def call_ms(self, request: AnyRequest, model: str, *, begun: bool, num_done: int = 0) -> float:
        """What is left of a call, alone on an empty machine that has all of its prompt cached.

        Args:
            request: Of the call.
            model: Served name.
            begun: The engine has it, so its first token may be nearly there.
            num_done: Tokens it has.
        """
        first_ms = 0.0 if begun else self._first_token.get(model, 0.0)
        more = max(0, least_tokens(request) - max(1, num_done))
        return MARGIN * (first_ms + more * self._token.get(model, 0.0))


def least_tokens(request: AnyRequest) -> int:
    """The number of tokens that no answer can do without."""
    if request.stop_strings or request.response_format is not None or request.structured_outputs is not None:
        return 1
    if isinstance(request, ChatCompletionRequest) and request.tools is not None:
        return 1
    limit = requested_max_tokens(request)
    if request.ignore_eos and not request.stop_token_ids and limit is not None:
        return limit
    return max(1, request.min_tokens)


def _lower(least: dict[str, float], model: str, time_ms: float) -> None:
    least[model] = min(time_ms, least.get(model, time_ms))

"""One call at work: engine requests for its choices in, OpenAI chunks and a completion out."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from macaw.errors import InternalServerError, MacawError, error_from_wire
from macaw.protocol import ChatCompletionRequest, CompletionRequest
from macaw_server.engine.types import CallHints, Engine, EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from macaw_server.programs.detokenizer import Detokenizer
from macaw_server.service.call_deltas import ChoiceCalls
from macaw_server.service.completions import Answer, ChoiceEnd, ResponseFormat, TokenReport, usage_object
from macaw_server.service.prompts import Prepared
from macaw_server.service.sampling import base_seed, sampling_params

log = logging.getLogger(__name__)


class CallObserver(Protocol):
    """Is told how a call goes; after `call_completed` or `call_failed` nothing more."""

    def call_started(self, call_id: str, *, prompt_ids: list[int], cached_tokens: int) -> None:
        """The engine took the call into a batch."""
        ...

    def call_delta(self, call_id: str, chunk: dict[str, Any]) -> None:
        """A piece of the answer."""
        ...

    def call_completed(self, call_id: str, completion: dict[str, Any], text: str) -> None:
        """The whole answer; `text` is the first choice's, without calls."""
        ...

    def call_failed(self, call_id: str, error: MacawError) -> None:
        """There will be no answer."""
        ...


@dataclass(slots=True)
class _Choice:
    """One of the `n` answers in the making."""

    index: int
    request_id: str
    detokenizer: Detokenizer
    calls: ChoiceCalls | None
    stop_token_ids: frozenset[int] = frozenset()
    pieces: list[str] = field(default_factory=list)
    reports: list[TokenReport] = field(default_factory=list)
    output_ids: array[int] = field(default_factory=lambda: array("I"))
    report_offset: int = 0
    started: bool = False
    finish_reason: ChoiceEnd | None = None


class CallRunner:
    """Runs one call on its model's engine.

    Args:
        call_id: For the observer.
        request: What the client sent.
        prepared: Model, prompt and output limit.
        format: Writes the response objects.
        request_id: Prefix of the engine's request ids, unique over the life of the server.
        salt: The tenant's cache namespace.
        hints: For the scheduler.
        observer: Is told how it goes.
    """

    def __init__(
        self,
        call_id: str,
        request: ChatCompletionRequest | CompletionRequest,
        prepared: Prepared,
        format: ResponseFormat,
        *,
        request_id: str,
        salt: str,
        hints: CallHints,
        observer: CallObserver,
    ) -> None:
        self._call_id = call_id
        self._request = request
        self._prepared = prepared
        self._format = format
        self._salt = salt
        self._hints = hints
        self._observer = observer
        self._cached_tokens: int | None = None
        self._over = False
        tools = prepared.tools
        self._choices = [
            _Choice(
                i,
                f"{request_id}/{i}",
                Detokenizer(
                    prepared.model.tokenizer,
                    prepared.prompt_ids,
                    request.stop_strings,
                    hidden=None if tools is None or not tools.special else tools.hidden,
                ),
                None if tools is None else ChoiceCalls(tools),
            )
            for i in range(request.n or 1)
        ]

    @property
    def text(self) -> str:
        """What the first choice has said so far, without calls."""
        return "".join(self._choices[0].pieces)

    def start(self) -> None:
        """Submit one engine request per choice; choice ``i`` has the ``i``-th seed after the first one's."""
        seed, engine = base_seed(self._request), self.engine
        for choice in self._choices:
            sampling = sampling_params(
                self._request,
                engine.info,
                max_tokens=self._prepared.max_tokens,
                seed=seed + choice.index,
                grammar=self._prepared.grammar,
            )
            choice.stop_token_ids = sampling.stop_token_ids
            request = EngineRequest(
                choice.request_id, self._prepared.prompt_ids, sampling, salt=self._salt, hints=self._hints
            )
            engine.submit(request, self._guarded(partial(self._on_output, choice)))

    @property
    def engine(self) -> Engine:
        """Where it runs."""
        return self._prepared.model.engine

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer that is least far."""
        return min(map(len, self.output_ids))

    @property
    def output_ids(self) -> list[array[int]]:
        """The tokens of each choice so far."""
        return [choice.output_ids for choice in self._choices]

    def end(self) -> list[str]:
        """The observer hears nothing more; returns the engine's requests that are still running."""
        self._over = True
        return [choice.request_id for choice in self._choices if choice.finish_reason is None]

    def _guarded(self, on_output: Callable[[EngineOutput], None]) -> Callable[[EngineOutput], None]:
        """A bug on our side fails this call and nothing else."""

        def guarded(output: EngineOutput) -> None:
            if self._over:
                return
            try:
                on_output(output)
            except Exception:
                log.exception("output of call %s of %s", self._call_id, self._format.id)
                self._fail(InternalServerError("A bug in the server broke this call; its log has the traceback."))

        return guarded

    def _on_output(self, choice: _Choice, output: EngineOutput) -> None:
        if output.error is not None:
            code, message = output.error
            self._fail(error_from_wire({"code": code, "message": message}))
            return
        if choice.finish_reason is not None:
            return  # was on its way when a stop string ended the choice
        self._note_start(output)
        if not output.token_ids and output.finish_reason is None:
            return
        token_ids, logprobs = output.token_ids, output.logprobs
        choice.output_ids.extend(token_ids)
        if output.finish_reason == "stop" and token_ids and token_ids[-1] in choice.stop_token_ids:  # it has no text
            token_ids, logprobs = token_ids[:-1], None if logprobs is None else logprobs[:-1]
        before = choice.detokenizer.num_tokens
        delta, stopped_by = choice.detokenizer.add(token_ids)
        num_used = choice.detokenizer.num_tokens - before
        if stopped_by is not None:
            self.engine.abort([choice.request_id], keep_pages=True)
            del choice.output_ids[len(choice.output_ids) - len(output.token_ids) + num_used :]
        elif output.finish_reason is not None:
            delta += choice.detokenizer.flush()
            stopped_by = choice.detokenizer.stopped_by
        end: FinishReason | None = "stop" if stopped_by is not None else output.finish_reason
        text, calls = delta, list[dict[str, Any]]()
        if choice.calls is not None:
            text, calls = choice.calls.add(delta, last=end is not None)
            if choice.calls.over and end is None:
                self.engine.abort([choice.request_id], keep_pages=True)
                end = "stop"
        choice.finish_reason = "tool_calls" if end == "stop" and choice.calls and choice.calls.complete else end
        self._send(choice, text, calls, self._reports(choice, token_ids[:num_used], logprobs))
        if all(c.finish_reason is not None for c in self._choices):
            self._complete()

    def _note_start(self, output: EngineOutput) -> None:
        """The first choice to start counts: its prompt is the one that is computed, the others find it."""
        if self._cached_tokens is None:
            self._cached_tokens = output.cached_tokens or 0
            self._observer.call_started(
                self._call_id, prompt_ids=self._prepared.prompt_ids, cached_tokens=self._cached_tokens
            )

    def _reports(
        self, choice: _Choice, token_ids: Sequence[int], logprobs: list[TokenLogprobs] | None
    ) -> list[TokenReport] | None:
        if logprobs is None:
            return None
        text_of = choice.detokenizer.token_text
        return [
            TokenReport(text_of(token_id), logprob, [(text_of(id_), other) for id_, other in top])
            for token_id, (logprob, top) in zip(token_ids, logprobs, strict=False)
        ]

    def _send(
        self, choice: _Choice, delta: str, calls: list[dict[str, Any]], reports: list[TokenReport] | None
    ) -> None:
        """Pass on what is new, if anything is; a chat says its role first."""
        if not choice.started and self._format.chat:
            self._observer.call_delta(self._call_id, self._format.role_chunk(choice.index))
        choice.started = True
        if not delta and not calls and not reports and choice.finish_reason is None:
            return
        choice.pieces.append(delta)
        choice.reports += reports or ()
        chunk = self._format.chunk(
            choice.index,
            delta,
            text_offset=choice.report_offset,
            finish_reason=choice.finish_reason,
            reports=reports,
            calls=calls,
        )
        choice.report_offset += sum(len(report.token.text) for report in reports or ())
        self._observer.call_delta(self._call_id, chunk)

    def _complete(self) -> None:
        self._over = True
        usage = usage_object(
            prompt_tokens=len(self._prepared.prompt_ids),
            completion_tokens=sum(map(len, self.output_ids)),
            cached_tokens=self._cached_tokens or 0,
        )
        wants_logprobs = self._request.logprobs is not None and self._request.logprobs is not False
        answers = [
            Answer(
                "".join(c.pieces),
                c.finish_reason,
                c.reports if wants_logprobs else None,
                () if c.calls is None else c.calls.calls,
            )
            for c in self._choices
        ]
        self._observer.call_completed(self._call_id, self._format.completion(answers, usage), answers[0].text)

    def _fail(self, error: MacawError) -> None:
        self.engine.abort(self.end())
        self._observer.call_failed(self._call_id, error)


def abort_all(runners: Iterable[CallRunner]) -> None:
    """Cancel calls: one message to each engine, so that it frees everything before its next step."""
    requests: dict[Engine, list[str]] = {}
    for runner in runners:
        requests.setdefault(runner.engine, []).extend(runner.end())
    for engine, request_ids in requests.items():
        engine.abort(request_ids)

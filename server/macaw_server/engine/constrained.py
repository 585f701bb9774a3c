"""The constrained requests of an engine: their grammars are compiled, and their masks made, in threads."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

from macaw_server.deep_thread import deep_thread
from macaw_server.engine.types import EngineRequest
from macaw_server.scheduler import Proposer

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

    from macaw_server.engine.grammar import GrammarState, Masks, Vocabulary

log = logging.getLogger(__name__)

MAX_CACHED_GRAMMARS = 32
"""Compiled grammars that are kept for later requests, the latest used."""
_WAIT_S = 0.01
"""How long an engine without other work waits for a grammar before it looks for messages again."""


class Released(NamedTuple):
    """A request whose grammar was compiled, or the error that says why it was not: a wire code and a message."""

    request: EngineRequest
    error: tuple[str, str] | None


class GrammarDrafts:
    """Proposes what another proposer does, as far as the grammar of the sequence allows it."""

    def __init__(self, proposer: Proposer, grammar: GrammarState) -> None:
        self._proposer = proposer
        self._grammar = grammar

    def propose(self, token_ids: Seq[int], limit: int) -> list[int]:
        """See `Proposer`."""
        drafts = self._proposer.propose(token_ids, limit)
        return drafts[: self._grammar.num_allowed(drafts)]


class ConstrainedRequests:
    """Holds constrained requests back until their grammars are compiled, and knows from then on where each is.

    A grammar takes up to a second to compile, and the vocabulary as long before the first one; meanwhile the batch
    goes on. Masks are made while the model runs. Both release the GIL for nearly all of their time.

    Args:
        load_tokenizer: Called once, when the first constrained request comes.
        vocab_size: Of the model.
    """

    def __init__(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase], vocab_size: int) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None  # the compiling thread's
        self._compiling: ThreadPoolExecutor | None = None
        self._masking = ThreadPoolExecutor(1, thread_name_prefix="macaw-masks")
        self._grammars: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._held: dict[str, tuple[EngineRequest, Future[LLMatcher]]] = {}
        self._states: dict[str, GrammarState] = {}

    @property
    def num_held(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._held)

    def hold(self, request: EngineRequest, grammar: str) -> None:
        """Take a request whose output must match `grammar`."""
        if grammar not in self._grammars:
            self._compiling = self._compiling or deep_thread("macaw-grammars")
            self._grammars[grammar] = self._compiling.submit(self._compile, grammar)
        self._grammars.move_to_end(grammar)
        self._held[request.request_id] = request, self._grammars[grammar]
        if len(self._grammars) > MAX_CACHED_GRAMMARS:
            self._grammars.popitem(last=False)

    def release(self, *, idle: bool) -> Iterator[Released]:
        """The held requests whose grammars are compiled by now, in order of arrival.

        Args:
            idle: Wait a moment for one, as there is nothing else to do.
        """
        if idle and self._held:
            wait([future for _, future in self._held.values()], _WAIT_S, FIRST_COMPLETED)
        for request, future in list(self._held.values()):
            if future.done():
                del self._held[request.request_id]
                yield Released(request, self._start(request, future))

    def state(self, request_id: str) -> GrammarState | None:
        """Where a request is in its grammar; None for those that have none."""
        return self._states.get(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is one of these."""
        self._held.pop(request_id, None)
        self._states.pop(request_id, None)

    def begin_masks(self, samples: Iterable[tuple[str, Seq[int]]]) -> Callable[[], dict[str, Masks]]:
        """Start to make the masks of a step; its states must not be used until the result was asked for.

        Args:
            samples: Of each sequence that samples, constrained or not: its request id and its drafts.

        Returns:
            What waits for the masks, by id of the constrained requests; see `GrammarState.masks`.
        """
        wanted = [(id_, state, drafts) for id_, drafts in samples if (state := self._states.get(id_)) is not None]
        if not wanted:
            return dict
        return self._masking.submit(lambda: {id_: state.masks(drafts) for id_, state, drafts in wanted}).result

    def _start(self, request: EngineRequest, future: Future[LLMatcher]) -> tuple[str, str] | None:
        from macaw_server.engine.grammar import GrammarError, GrammarState

        match future.exception():
            case None:
                assert self._vocabulary is not None, "a grammar was compiled without a vocabulary"
                state = GrammarState(future.result(), self._vocabulary, request.sampling, request.output_ids)
                self._states[request.request_id] = state
                return None
            case GrammarError() as error:
                return "invalid_request", f"The grammar cannot be compiled: {error}."
            case error:
                log.error("compiling a grammar", exc_info=error)
                self._grammars.clear()  # the next request tries again
                return "internal_error", f"Constrained decoding failed: {type(error).__name__}: {error}"

    def _compile(self, grammar: str) -> LLMatcher:
        from macaw_server.engine.grammar import Vocabulary, compile_grammar

        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self._load_tokenizer(), self._vocab_size)
        return compile_grammar(self._vocabulary.tokenizer, grammar)

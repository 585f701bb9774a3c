"""The engine: a loaded model, its KV cache and its scheduler, and the step that joins them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from macaw_kernels import ALWAYS_SHARE, CPU_TORCH, NEVER_SHARE, DeviceProfile, default_profile, native_available
from macaw_server.config import EngineConfig
from macaw_server.engine.constrained import ConstrainedRequests, GrammarDrafts
from macaw_server.engine.memory import choose_device, choose_dtype, size_pool
from macaw_server.engine.runner import Chunk, ModelRunner
from macaw_server.engine.sampler import Row, Sampled, sample
from macaw_server.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, PublicPrefixes
from macaw_server.kvcache import KVCache
from macaw_server.models import loader
from macaw_server.models.native import FAMILIES
from macaw_server.models.probe import prepare
from macaw_server.scheduler import (
    Proposer,
    ProposerFactory,
    ScheduledBatch,
    ScheduledChunk,
    Scheduler,
    SchedulerConfig,
    make_policy,
    prompt_lookup,
)

if TYPE_CHECKING:
    from macaw_server.engine.grammar import GrammarState, Masks

log = logging.getLogger(__name__)

_RIDGE = {"cpu": 8.0, "cuda": 128.0}
"""`--speculative-ridge` by device."""


class EngineCore:
    """One model on one device. Not thread-safe: whoever owns it calls it from one thread.

    Args:
        config: What to load and how.
        on_loading: Told what is going on while the model loads.
        public_prefixes: Tokens of texts whose K/V all tenants share.
        make_proposer: Makes what proposes a request's draft tokens.

    Raises:
        StartupError: The model cannot be served; the message says why and what to do.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_loading: Callable[[str], None] = lambda _: None,
        public_prefixes: PublicPrefixes = (),
        make_proposer: ProposerFactory = prompt_lookup,
    ) -> None:
        device = choose_device(config.device)
        hf = loader.load_config(config)
        dtype = choose_dtype(config.dtype, device, native=_native(config, device, hf))
        profile = _profile(config, device, dtype)
        model = loader.load_model(config, hf, device, dtype, on_loading)
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        if device.type == "cpu":
            # Below this size the threads' meeting points cost more than a second thread brings.
            threads = config.threads or (1 if weight_bytes < 64 * 2**20 else os.cpu_count() or 1)
            torch.set_num_threads(max(1, threads // config.engines))
        on_loading("checking the model's attention against transformers")
        prepared = prepare(model, config, profile, lambda: loader.max_model_len(config, hf))
        page_bytes = sum(spec.page_bytes(config.page_size, dtype) for spec in prepared.layers.values())
        pool = size_pool(config, page_bytes=page_bytes, max_model_len=loader.max_model_len(config, hf), device=device)
        on_loading(f"allocating {pool.num_pages:,} KV pages")
        self._runner = ModelRunner(
            prepared.forward,
            prepared.layers,
            num_pages=pool.num_pages,
            page_size=config.page_size,
            dtype=dtype,
            device=device,
            profile=profile,
            attention_backend=None if config.native else "torch",
        )
        self._config = config
        self._public_prefixes = public_prefixes
        self._make_proposer = make_proposer
        self._steps = 0
        self._forward_s = self._overhead_s = 0.0
        self.info = EngineInfo(
            vocab_size=hf.get_text_config().vocab_size,
            max_model_len=pool.max_model_len,
            page_size=config.page_size,
            num_pages=pool.num_pages,
            page_bytes=page_bytes,
            weight_bytes=prepared.weight_bytes,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            backend=prepared.backend,
            eos_token_ids=loader.eos_token_ids(config, model),
        )
        self._scheduler = self._new_scheduler()
        self._constrained = ConstrainedRequests(lambda: loader.load_tokenizer(config), self.info.vocab_size)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work or self._constrained.num_held > 0

    def add(self, request: EngineRequest) -> EngineOutput | None:
        """Queue a request; the answer, if there is one, is its refusal."""
        if request.sampling.grammar is not None:
            self._constrained.hold(request, request.sampling.grammar)
            return None
        return self._queue(request)

    def _queue(self, request: EngineRequest) -> EngineOutput | None:
        try:
            sequence = self._scheduler.add(request, time.monotonic())
        except ValueError as e:
            return EngineOutput(request.request_id, error=("context_length_exceeded", str(e)))
        if sequence.finish_reason is not None:  # taken up again after its last token
            return EngineOutput(request.request_id, finish_reason=sequence.finish_reason)
        return None

    def abort(self, request_ids: Iterable[str], *, keep_pages: bool) -> None:
        """Forget requests and free their pages; see `Engine.abort`."""
        request_ids = list(request_ids)
        self._scheduler.abort(*request_ids, keep_pages=keep_pages)
        for request_id in request_ids:
            self._constrained.drop(request_id)

    def step(self) -> list[EngineOutput]:
        """One round: schedule -> run -> postprocess."""
        begin = time.perf_counter()
        refused = self._queue_compiled()
        batch = self._scheduler.schedule(time.monotonic())
        if not batch.chunks:
            return refused
        ready = time.perf_counter()
        try:
            sampled = self._run(batch)
        except Exception as e:
            log.exception("a step of %d sequences failed", len(batch.chunks))
            return refused + self._recover(batch, f"The engine's step failed: {type(e).__name__}: {e}")
        done = time.perf_counter()
        outputs = self._postprocess(batch, sampled)
        self._steps += 1
        self._forward_s += done - ready
        self._overhead_s += time.perf_counter() - done + ready - begin
        return refused + outputs

    def stats(self) -> EngineStats:
        """The counters now."""
        stats = self._scheduler.stats()
        stats.waiting += self._constrained.num_held
        stats.steps, stats.forward_s, stats.overhead_s = self._steps, self._forward_s, self._overhead_s
        return stats

    def _queue_compiled(self) -> list[EngineOutput]:
        """Queue the requests whose grammars are compiled by now; the answers of those that are refused."""
        outputs = []
        for request, error in self._constrained.release(idle=not self._scheduler.has_work):
            refused = EngineOutput(request.request_id, error=error) if error else self._queue(request)
            if refused is not None:
                self._constrained.drop(request.request_id)
                outputs.append(refused)
        return outputs

    def _new_scheduler(self) -> Scheduler:
        config = SchedulerConfig(
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=max(self._config.max_num_batched_tokens, self._config.max_num_seqs),
            max_model_len=self.info.max_model_len,
            max_draft_tokens=self._config.speculative_tokens,
            ridge=self._config.speculative_ridge or _RIDGE[torch.device(self.info.device).type],
        )
        cache = KVCache(self.info.num_pages, self.info.page_size, self._public_prefixes)
        return Scheduler(config, cache, make_policy(self._config.policy), self._proposer)

    def _proposer(self, request: EngineRequest) -> Proposer:
        """What drafts a request's tokens; of a constrained one only what its grammar allows."""
        proposer = self._make_proposer(request)
        grammar = self._constrained.state(request.request_id)
        return proposer if grammar is None else GrammarDrafts(proposer, grammar)

    def _run(self, batch: ScheduledBatch) -> dict[str, Seq[Sampled]]:
        """Forward pass and sampling; the choices of each sequence that samples, as far as its drafts hold."""
        sampling = [chunk for chunk in batch.chunks if chunk.samples]
        masks = self._constrained.begin_masks((c.sequence.request_id, c.drafts) for c in sampling)
        logits = self._runner.run(
            [Chunk(c.token_ids, c.start, c.sequence.block_table, c.num_samples) for c in batch.chunks]
        )
        allowed = masks()
        rows = [row for c in sampling for row in _rows(c, allowed.get(c.sequence.request_id))]
        choices = iter(sample(logits, rows, native=self._config.native))
        return {c.sequence.request_id: _verified(c.drafts, list(islice(choices, c.num_samples))) for c in sampling}

    def _postprocess(self, batch: ScheduledBatch, sampled: dict[str, Seq[Sampled]]) -> list[EngineOutput]:
        """Append the tokens, end what is at its end, and say what happened to whom."""
        outputs = {s.request_id: EngineOutput(s.request_id, cached_tokens=s.cached_tokens) for s in batch.admitted}
        tokens: dict[str, list[int]] = {}
        complete: set[str] = set()
        for request_id, choices in sampled.items():
            output = outputs.setdefault(request_id, EngineOutput(request_id))
            chosen = [choice.token for choice in choices if choice.token is not None]
            grammar = self._constrained.state(request_id)
            if grammar is not None:
                chosen = chosen[: grammar.accept(chosen)]
            if grammar is not None and grammar.over:
                complete.add(request_id)
            elif not chosen:  # behind drafts that hold the next step finds out
                output.error = _why_no_token(grammar)
                self._scheduler.abort(request_id, keep_pages=False)
                self._constrained.drop(request_id)
                continue
            tokens[request_id] = output.token_ids = chosen
            output.logprobs = [c.logprobs for c in choices[: len(chosen)] if c.logprobs is not None] or None
        for sequence in self._scheduler.update(batch, tokens, complete):
            outputs[sequence.request_id].finish_reason = sequence.finish_reason
            self._constrained.drop(sequence.request_id)
        return list(outputs.values())

    def _recover(self, batch: ScheduledBatch, message: str) -> list[EngineOutput]:
        """After a failed step: its sequences end with an error; all others start again on an empty cache.

        What the failed step has written to its pages is unknown, so nothing of the cache is kept.
        """
        failed = {chunk.sequence.request_id for chunk in batch.chunks}
        for request_id in failed:
            self._constrained.drop(request_id)
        others = [s for s in self._scheduler.sequences if s.request_id not in failed]
        self._scheduler = self._new_scheduler()
        now_s = time.monotonic()
        for sequence in others:
            outputs = sequence.token_ids[len(sequence.request.prompt_ids) :]
            self._scheduler.add(replace(sequence.request, output_ids=outputs), now_s)
        return [EngineOutput(request_id, error=("internal_error", message)) for request_id in failed]


def _rows(chunk: ScheduledChunk, masks: Masks | None) -> Iterator[Row]:
    """The rows of a chunk that samples, one after each number of its drafts."""
    sequence, drafts = chunk.sequence, chunk.drafts
    params, num_prompt = sequence.request.sampling, len(sequence.request.prompt_ids)
    for i in range(chunk.num_samples):
        yield Row(params, sequence.token_ids, num_prompt, drafts[:i], None if masks is None else masks[i])


def _verified(drafts: Seq[int], choices: Seq[Sampled]) -> Seq[Sampled]:
    """The choices up to the first that is not its draft; what follows was computed after a wrong token."""
    num_right = next((i for i, (d, c) in enumerate(zip(drafts, choices, strict=False)) if d != c.token), len(drafts))
    return choices[: num_right + 1]


def _why_no_token(grammar: GrammarState | None) -> tuple[str, str]:
    """The error of a sequence for which nothing could be sampled: a wire code and a message."""
    if grammar is not None and grammar.error is not None:
        return "invalid_request", grammar.error
    return "internal_error", "The model's logits are not numbers; are its weights sound?"


def _native(config: EngineConfig, device: torch.device, hf: Any) -> bool:
    """Whether the native CPU decoder is likely to run the model; loading tells for sure."""
    covered = hf.get_text_config().model_type in FAMILIES
    return config.native and device.type == "cpu" and covered and native_available()


def _profile(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> DeviceProfile:
    """The attention planner's cost model for `--sharing`."""
    if config.sharing != "auto":
        return {"always": ALWAYS_SHARE, "never": NEVER_SHARE}[config.sharing]
    if device.type == "cpu" and not config.native:
        return CPU_TORCH
    return default_profile(device, dtype)

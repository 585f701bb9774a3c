"""The engine: a loaded model, its KV cache and its scheduler, and the step that joins them."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from macaw_kernels import (
    ALWAYS_SHARE,
    CPU_TORCH,
    NEVER_SHARE,
    DeviceProfile,
    HeadConfig,
    default_profile,
    native_available,
)
from macaw_server.config import EngineConfig
from macaw_server.engine.constrained import ConstrainedRequests, GrammarDrafts
from macaw_server.engine.flight import Flight, chunks, rows, sampling
from macaw_server.engine.free_rows import free_rows, measure_rows, row_price
from macaw_server.engine.graphs import GraphError, cuda_capture
from macaw_server.engine.memory import choose_device, choose_dtype, size_pool
from macaw_server.engine.ridge import RidgeEstimate, limited, measured
from macaw_server.engine.runner import ModelRunner
from macaw_server.engine.sampler import Choices, Sampled, sample
from macaw_server.engine.tensor_parallel import Runner, TensorParallel
from macaw_server.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, PublicPrefixes
from macaw_server.errors import ConfigError
from macaw_server.kvcache import KVCache
from macaw_server.models import loader
from macaw_server.models.native import FAMILIES
from macaw_server.models.probe import capture_graphs, prepare
from macaw_server.scheduler import (
    Proposer,
    ProposerFactory,
    ScheduledBatch,
    Scheduler,
    SchedulerConfig,
    SequenceStatus,
    StepFeatures,
    StepTimeModel,
    make_policy,
    prompt_lookup,
    step_features,
)

if TYPE_CHECKING:
    from macaw_server.engine.grammar import GrammarState

log = logging.getLogger(__name__)

_AHEAD_ROWS = 64
"""`--ahead-rows` of a GPU, and the ridge that is assumed there; on a CPU both are measured."""
AHEAD_HOLD_S = 0.01
"""How long an engine waits with steps of nothing but work ahead after it has done other work: a few times what a call
takes to follow on the answer that it reads, and little of what a tool or a person takes."""


class EngineCore:
    """One model on one device. Not thread-safe: whoever owns it calls it from one thread.

    Args:
        config: What to load and how.
        on_loading: Told what is going on while the model loads.
        public_prefixes: Tokens of texts whose K/V all tenants share.
        make_proposer: Makes what proposes a request's draft tokens.
        ranks: This process's part, where the engine has several ranks.

    Attributes:
        info: What was loaded.

    Raises:
        StartupError: The model cannot be served; the message says why and what to do.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_loading: Callable[[str], None] = lambda _: None,
        public_prefixes: PublicPrefixes = (),
        make_proposer: ProposerFactory = prompt_lookup,
        ranks: TensorParallel | None = None,
    ) -> None:
        if config.tensor_parallel_size > 1 and ranks is None:
            raise ConfigError(
                f"--tensor-parallel-size {config.tensor_parallel_size} needs an engine in processes of its own, as "
                "`macaw serve` has it; an engine in a thread has one rank."
            )
        device = choose_device(config.device) if ranks is None else ranks.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams, graphs and Triton's launches go to the current one
        hf = loader.load_config(config)
        dtype = choose_dtype(config.dtype, device, native=_native(config, device, hf))
        profile = partial(_profile, config, device, dtype)
        model = loader.load_model(config, hf, device, dtype, on_loading)
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        if device.type == "cpu":
            # Below this size the threads' meeting points cost more than a second thread brings.
            processes = config.engines * config.tensor_parallel_size
            num_threads = config.threads or (1 if weight_bytes < 64 * 2**20 else os.cpu_count() or 1)
            torch.set_num_threads(max(1, num_threads // processes))
        on_loading("checking the model's attention against transformers")
        prepared = prepare(model, config, profile, lambda: loader.max_model_len(config, hf))
        page_bytes = sum(spec.page_bytes(config.page_size, dtype) for spec in prepared.layers.values())
        pool = size_pool(config, page_bytes=page_bytes, max_model_len=loader.max_model_len(config, hf), device=device)
        if ranks is not None:
            pool = ranks.smallest(pool)
        on_loading(f"allocating {pool.num_pages:,} KV pages")
        runner = ModelRunner(
            prepared.forward,
            prepared.layers,
            num_pages=pool.num_pages,
            page_size=config.page_size,
            dtype=dtype,
            device=device,
            profile=profile,
            attention_backend="torch" if device.type == "cpu" and not config.native else None,
        )
        if config.cuda_graphs and device.type == "cuda" and ranks is None:
            try:
                capture_graphs(
                    runner,
                    cuda_capture(),
                    max_num_seqs=config.max_num_seqs,
                    max_model_len=pool.max_model_len,
                    num_pages=pool.num_pages,
                    vocab_size=hf.get_text_config().vocab_size,
                    dtype=dtype,
                    progress=on_loading,
                )
            except GraphError as e:
                log.warning("decode steps run without CUDA graphs, and slower: %s", e)
        self._runner: Runner = runner
        self._config = config
        self._public_prefixes = public_prefixes
        self._make_proposer = make_proposer
        self._step_time = StepTimeModel()
        self._overlap = ranks is None and (device.type == "cuda" if config.overlap is None else config.overlap)
        self._ahead: Flight | None = None
        self._steps = 0
        self._worked_s = -math.inf  # when the last step ended that was not for work ahead alone
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
            ahead_rows=_AHEAD_ROWS if config.ahead_rows is None else config.ahead_rows,
        )
        self._prefill_ridge = float(_AHEAD_ROWS)
        if device.type == "cpu" and config.ahead_rows is None:
            on_loading("measuring what rows beside a decode cost")
            times = measure_rows(runner, self.info)
            self._prefill_ridge = limited(times[1], row_price(times))
            self.info = replace(self.info, ahead_rows=free_rows(times))
        self._ridge: RidgeEstimate | None = None
        if config.speculative_tokens and config.speculative_ridge is None:
            on_loading("measuring what a draft costs")
            self._ridge = measured(self._runner, self.info)
        self._scheduler = self._new_scheduler()
        self._constrained = ConstrainedRequests(lambda: loader.load_tokenizer(config), self.info.vocab_size)
        self._ranks = ranks
        if ranks is not None and ranks.leads:
            self._runner = ranks.lead(self._runner)

    def follow(self) -> None:
        """Run the steps of rank 0 until that leaves; what any other rank does instead of steps of its own."""
        assert self._ranks is not None
        self._ranks.follow(self._runner)

    @property
    def step_time(self) -> StepTimeModel:
        """What has been learned of how long steps take."""
        return self._step_time

    @property
    def ridge(self) -> float:
        """Rows that cost as much as a step does without any: given, or measured."""
        return self._ridge.ridge if self._ridge is not None else self._config.speculative_ridge or self._prefill_ridge

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work or self._constrained.num_held > 0 or self._ahead is not None

    def hold_s(self) -> float:
        """Seconds for which the next step may wait for messages; 0 but while all work is ahead of time.

        The calls that follow on what has just ended are on their way then. They begin with what would be computed
        ahead: in a step of their own prompt it costs less than in one before it, which they would have to wait for.
        """
        if not self._scheduler.only_ahead or self._constrained.num_held or self._ahead is not None:
            return 0.0
        return max(0.0, self._worked_s + AHEAD_HOLD_S - time.monotonic())

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

    def abort(self, request_ids: Iterable[str], *, keep_pages: bool = False) -> None:
        """Forget requests and free their pages; see `Engine.abort`."""
        request_ids = list(request_ids)
        self._scheduler.abort(*request_ids, keep_pages=keep_pages)
        for request_id in request_ids:
            self._constrained.drop(request_id)

    def let_go(self, holders: Iterable[str]) -> None:
        """Keep nothing for these any more; see `Engine.let_go`."""
        self._scheduler.let_go(holders)

    def step(self) -> list[EngineOutput]:
        """One round: schedule -> run -> postprocess. With overlap the next batch runs before this one is read."""
        begin, forward_s = time.perf_counter(), self._forward_s
        outputs = self._queue_compiled()
        flight = self._ahead or self._launch(self._scheduler.schedule(time.monotonic()))
        if flight is None:
            return outputs
        self._ahead = self._launch_ahead(flight) if self._overlap else None
        outputs += self._land(flight)
        if not all(chunk.sequence.is_ahead for chunk in flight.batch.chunks):
            self._worked_s = time.monotonic()
        self._note_time(flight, time.perf_counter() - begin, self._forward_s - forward_s)
        return outputs

    def stats(self) -> EngineStats:
        """The counters now."""
        stats = self._scheduler.stats()
        stats.waiting += self._constrained.num_held
        stats.steps, stats.forward_s, stats.overhead_s = self._steps, self._forward_s, self._overhead_s
        stats.step_time_ms = self._step_time.coefficients._asdict()
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

    def _note_time(self, flight: Flight, step_s: float, forward_s: float) -> None:
        """Count a step that went well, and let the models learn from it."""
        self._steps += 1
        self._overhead_s += step_s - forward_s
        if not isinstance(flight.choices, Choices):
            return
        self._step_time.observe(flight.features, 1000 * step_s)
        if self._ridge is not None and all(chunk.length == 1 for chunk in flight.batch.chunks):
            self._ridge.observe(flight.features.num_samples, forward_s)
            self._scheduler.ridge = self._ridge.ridge

    def _new_scheduler(self) -> Scheduler:
        config = SchedulerConfig(
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=max(self._config.max_num_batched_tokens, self._config.max_num_seqs),
            max_model_len=self.info.max_model_len,
            max_draft_tokens=self._config.speculative_tokens,
            latency_slowdown=self._config.latency_slowdown,
            ridge=self.ridge,
            ahead_rows=self.info.ahead_rows,
        )
        cache = KVCache(
            self.info.num_pages,
            self.info.page_size,
            self._public_prefixes,
            self._config.eviction,
            prefix_caching=self._config.prefix_caching,
            single_flight=self._config.single_flight,
        )
        policy = make_policy(self._config.policy, task_groups=self._config.task_groups)
        return Scheduler(config, cache, policy, self._proposer, self._step_time)

    def _proposer(self, request: EngineRequest) -> Proposer:
        """What drafts a request's tokens; of a constrained one only what its grammar allows."""
        proposer = self._make_proposer(request)
        grammar = self._constrained.state(request.request_id)
        return proposer if grammar is None else GrammarDrafts(proposer, grammar)

    def _launch(self, batch: ScheduledBatch, before: Flight | None = None) -> Flight | None:
        """Issue the forward pass and the sampling of a batch, if there is anything in it.

        Args:
            batch: As scheduled.
            before: The step that samples the batch's tokens, if it is one ahead.
        """
        if not batch.chunks:
            return Flight(batch, StepFeatures(), None) if batch.finished else None
        begin, features = time.perf_counter(), step_features(batch)
        try:
            masks = self._constrained.begin_masks((c.sequence.request_id, c.drafts) for c in sampling(batch))
            logits = self._runner.run(chunks(batch), None if before is None else before.tokens_of(batch))
            allowed = masks()
            wanted = [row for c in sampling(batch) for row in rows(batch, c, allowed.get(c.sequence.request_id))]
            return Flight(batch, features, sample(logits, wanted, native=self._config.native))
        except Exception as e:
            return Flight(batch, features, e)  # it is told when this step's turn has come
        finally:
            self._forward_s += time.perf_counter() - begin

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """Launch the step after the one in flight, where that need not wait for its tokens."""
        ahead = self._scheduler.schedule_ahead() if isinstance(flight.choices, Choices) else None
        return None if ahead is None else self._launch(ahead, flight)

    def _land(self, flight: Flight) -> list[EngineOutput]:
        """Wait for a step's tokens, and say what it did."""
        begin = time.perf_counter()
        try:
            sampled = flight.result()
        except Exception as e:
            log.exception("a step of %d sequences failed", len(flight.batch.chunks))
            return self._recover(flight.batch, f"The engine's step failed: {type(e).__name__}: {e}")
        finally:
            self._forward_s += time.perf_counter() - begin
        outputs = self._postprocess(flight.batch, sampled)
        if self._ahead is not None:
            self._scheduler.confirm(self._ahead.batch)
        return outputs

    def _postprocess(self, batch: ScheduledBatch, sampled: dict[str, Seq[Sampled]]) -> list[EngineOutput]:
        """Append the tokens, end what is at its end, and say what happened to whom."""
        taken_up = (*batch.admitted, *batch.finished)
        outputs = {s.request_id: EngineOutput(s.request_id, cached_tokens=s.cached_tokens) for s in taken_up}
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
            output = outputs.setdefault(sequence.request_id, EngineOutput(sequence.request_id))
            output.finish_reason = sequence.finish_reason
            self._constrained.drop(sequence.request_id)
        return list(outputs.values())

    def _recover(self, batch: ScheduledBatch, message: str) -> list[EngineOutput]:
        """After a failed step: its sequences end with an error; all others start again on an empty cache.

        What the failed step has written to its pages is unknown, so nothing of the cache is kept.
        """
        self._ahead = None  # its sequences are all of this batch
        running = (c.sequence for c in batch.chunks if c.sequence.status is SequenceStatus.RUNNING)
        failed = {sequence.request_id for sequence in running}
        for request_id in failed:
            self._constrained.drop(request_id)
        others = [s for s in self._scheduler.sequences if s.request_id not in failed]
        self._scheduler = self._new_scheduler()
        now_s = time.monotonic()
        for sequence in others:
            outputs = sequence.token_ids[len(sequence.request.prompt_ids) :]
            self._scheduler.add(replace(sequence.request, output_ids=outputs), now_s)
        return [EngineOutput(request_id, error=("internal_error", message)) for request_id in failed]


def _why_no_token(grammar: GrammarState | None) -> tuple[str, str]:
    """The error of a sequence for which nothing could be sampled: a wire code and a message."""
    if grammar is not None and grammar.error is not None:
        return "invalid_request", grammar.error
    return "internal_error", "The model's logits are not numbers; are its weights sound?"


def _native(config: EngineConfig, device: torch.device, hf: Any) -> bool:
    """Whether the native CPU decoder is likely to run the model; loading tells for sure."""
    covered = hf.get_text_config().model_type in FAMILIES
    alone = config.tensor_parallel_size == 1
    return config.native and alone and device.type == "cpu" and covered and native_available()


def _profile(config: EngineConfig, device: torch.device, dtype: torch.dtype, heads: HeadConfig) -> DeviceProfile:
    """The attention planner's cost model for `--sharing`."""
    if config.sharing != "auto":
        return {"always": ALWAYS_SHARE, "never": NEVER_SHARE}[config.sharing]
    if device.type == "cpu" and not config.native:
        return CPU_TORCH
    return default_profile(device, dtype, heads=heads)

"""The engine: a loaded model, its KV cache and its scheduler, and the step that joins them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from macaw_kernels import DeviceProfile

from macaw_server.config import EngineConfig
from macaw_server.engine.memory import choose_device, choose_dtype, size_pool
from macaw_server.engine.runner import Chunk, ModelRunner
from macaw_server.engine.sampler import Row, Sampled, sample
from macaw_server.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats
from macaw_server.kvcache import KVCache
from macaw_server.models import loader
from macaw_server.models.probe import prepare
from macaw_server.scheduler import ScheduledBatch, Scheduler, SchedulerConfig, make_policy

log = logging.getLogger(__name__)


class EngineCore:
    """One model on one device. Not thread-safe: whoever owns it calls it from one thread.

    Args:
        config: What to load and how.
        on_loading: Told what is going on while the model loads.

    Raises:
        StartupError: The model cannot be served; the message says why and what to do.
    """

    def __init__(self, config: EngineConfig, on_loading: Callable[[str], None] = lambda _: None) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        hf = loader.load_config(config)
        profile = _profile(config.sharing)
        model = loader.load_model(config, hf, device, dtype, on_loading)
        on_loading("checking the model's attention against transformers")
        layers = prepare(model, config.model, profile)
        page_bytes = sum(spec.page_bytes(config.page_size, dtype) for spec in layers.values())
        pool = size_pool(
            config, page_bytes=page_bytes, max_model_len=loader.max_model_len(config, hf), device=device
        )
        on_loading(f"allocating {pool.num_pages:,} KV pages")
        self._runner = ModelRunner(
            model, layers, num_pages=pool.num_pages, page_size=config.page_size, dtype=dtype, profile=profile
        )
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=max(config.max_num_batched_tokens, config.max_num_seqs),
                max_model_len=pool.max_model_len,
            ),
            KVCache(pool.num_pages, config.page_size),
            make_policy(config.policy),
        )
        self._steps = 0
        self._forward_s = self._overhead_s = 0.0
        self.info = EngineInfo(
            vocab_size=hf.get_text_config().vocab_size,
            max_model_len=pool.max_model_len,
            page_size=config.page_size,
            num_pages=pool.num_pages,
            page_bytes=page_bytes,
            weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            eos_token_ids=loader.eos_token_ids(config, model),
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    def add(self, request: EngineRequest) -> EngineOutput | None:
        """Queue a request; the answer, if there is one, is its refusal."""
        try:
            self._scheduler.add(request, time.monotonic())
        except ValueError as e:
            return EngineOutput(request.request_id, error=("context_length_exceeded", str(e)))
        return None

    def abort(self, request_id: str) -> None:
        """Forget a request and free its pages."""
        self._scheduler.abort(request_id)

    def step(self) -> list[EngineOutput]:
        """One round: schedule -> run -> postprocess."""
        begin = time.perf_counter()
        batch = self._scheduler.schedule(time.monotonic())
        if not batch.chunks:
            return []
        ready = time.perf_counter()
        try:
            sampled = self._run(batch)
        except Exception as e:
            log.exception("a step of %d sequences failed", len(batch.chunks))
            return self._drop(batch, ("internal_error", f"The engine's step failed: {type(e).__name__}: {e}"))
        done = time.perf_counter()
        outputs = self._postprocess(batch, sampled)
        self._steps += 1
        self._forward_s += done - ready
        self._overhead_s += time.perf_counter() - done + ready - begin
        return outputs

    def stats(self) -> EngineStats:
        """The counters now."""
        stats = self._scheduler.stats()
        stats.steps, stats.forward_s, stats.overhead_s = self._steps, self._forward_s, self._overhead_s
        return stats

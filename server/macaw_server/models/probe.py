"""The load-time probe: a model that would answer wrongly through paged attention is refused, not served.

transformers lets us replace a model's attention, but not every architecture goes through the replacement, and some do
and still compute something else. So every model first answers the same short prompts twice, stock and paged; and a
third time by the native decoder, where there is one. Captured graphs are checked in the same way. A model that routes
tokens to experts, and whose logits differ in half precision, is compared layer by layer (`layerwise`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macaw_kernels import DeviceProfile, HeadConfig
from macaw_kernels.cpu.build import NativeBuildError
from macaw_kernels.cpu.decoder import NativeDecoder
from macaw_kernels.cpu.linear import WeightType
from macaw_server.config import EngineConfig
from macaw_server.engine.attention import (
    ATTENTION_NAME,
    BatchContext,
    LayerSpec,
    UnsupportedAttentionError,
    current_batch,
)
from macaw_server.engine.forward import ForwardPass, NativeForward, StockForward
from macaw_server.engine.graphs import Capture, GraphError
from macaw_server.engine.memory import fast_bfloat16
from macaw_server.engine.runner import Chunk, ModelRunner
from macaw_server.errors import ConfigError, ModelLoadError
from macaw_server.models.layerwise import LayerTrace, Rows, routes
from macaw_server.models.native import NotNativeError, free_weights, read_weights

log = logging.getLogger(__name__)

ProfileOf = Callable[[HeadConfig], DeviceProfile]

# How far logits may be from stock ones, in standard deviations of the stock logits.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
_INT8_TOLERANCE = 0.5
"""Likewise with int8 weights: beyond this the model is not what was trained."""


class Prepared(NamedTuple):
    """A model that answers through pages.

    Attributes:
        layers: Its attention layers by ``layer_idx``.
        forward: Runs it.
        backend: ``native`` or ``transformers``.
        weight_bytes: Bytes of its weights, as they are held now.
    """

    layers: dict[int, LayerSpec]
    forward: ForwardPass
    backend: Literal["native", "transformers"]
    weight_bytes: int


def prepare(model: nn.Module, config: EngineConfig, profile: ProfileOf, max_model_len: Callable[[], int]) -> Prepared:
    """Switch `model` to paged attention, and to the native decoder where there is one, checking its answers.

    Args:
        model: In eval mode with transformers' eager attention.
        config: What is to be served.
        profile: The attention planner's cost model, by heads.
        max_model_len: Says beyond which length no context will go; asked only for models that are supported.

    Raises:
        ModelLoadError: The architecture is not supported; the message says why.
        ConfigError: Quantization was asked for, and this model cannot have it.
    """
    hf: Any = model.config
    prompts = _prompts(hf.get_text_config().vocab_size)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.inference_mode(), _quick_products(model):
        stock = [_stock_logits(model, prompt) for prompt in prompts]
        forward = StockForward(model)
        on_cpu = next(model.parameters()).device.type == "cpu"
        attention_backend = "torch" if on_cpu and not config.native else None
        tolerance = _TOLERANCE[next(model.parameters()).dtype]
        try:
            batch = _discover(model)
            layers = batch.seen
            error = _error(_paged_logits(model, forward, layers, prompts, profile, attention_backend), stock)
            if not error <= tolerance:
                reason = f"on a probe its logits are off by {error:.2g} standard deviations (accepted: {tolerance:g})"
                if tolerance == _TOLERANCE[torch.float32] or not routes(hf):
                    raise UnsupportedAttentionError(reason)
                _check_layers(model, forward, batch, prompts, profile, attention_backend, tolerance)
                log.info(
                    "%s is accepted layer by layer: %s, as rounding changes which experts are chosen",
                    config.model,
                    reason,
                )
        except UnsupportedAttentionError as e:
            raise _refusal(model, config.model, str(e)) from e
        try:
            decoder = _native(model, config, layers, max(max_model_len(), *map(len, prompts)))
            error = _error(_paged_logits(model, NativeForward(decoder), layers, prompts, profile), stock)
            tolerance = _INT8_TOLERANCE if config.quantization == "int8" else tolerance
            if not error <= tolerance:
                raise NotNativeError(f"its logits are off by {error:.2g} standard deviations (accepted: {tolerance:g})")
        except (NotNativeError, NativeBuildError) as e:
            if config.quantization is not None:
                raise ConfigError(
                    f"--quantization {config.quantization} needs the native CPU decoder, and {config.model} cannot "
                    f"have it: {e}. Serve without --quantization."
                ) from e
            log.info("%s runs on transformers' own modules, not on the native CPU decoder: %s", config.model, e)
            if config.torch_compile:
                answers = partial(_paged_logits, model, forward, layers, prompts, profile, attention_backend)
                _compile(forward, config, answers, stock)
            return Prepared(layers, forward, "transformers", weight_bytes)
    if config.torch_compile:
        raise ConfigError(
            f"--torch-compile is for transformers' modules, and {config.model} runs on the native CPU decoder. Serve "
            "without --torch-compile, or with --no-native."
        )
    log.info(
        "%s runs on the native CPU decoder with %s weights; logits of a probe differ from transformers' by %.2g "
        "standard deviations",
        config.model,
        decoder.weight_type,
        error,
    )
    free_weights(model)
    return Prepared(layers, NativeForward(decoder), "native", decoder.weight_bytes)


def _compile(
    forward: StockForward, config: EngineConfig, paged_logits: Callable[[], Seq[Tensor]], stock: Seq[Tensor]
) -> None:
    """Compile the modules, which must answer as before.

    Raises:
        ConfigError: They cannot be compiled, or answer something else.
    """
    forward.compile()
    try:
        error = _error(paged_logits(), stock)
    except Exception as e:
        raise ConfigError(f"--torch-compile: {config.model} cannot be compiled. {type(e).__name__}: {e}") from e
    if not error <= (tolerance := _TOLERANCE[next(forward.model.parameters()).dtype]):
        raise ConfigError(
            f"--torch-compile: compiled, {config.model} answers otherwise: logits are off by {error:.2g} standard "
            f"deviations (accepted: {tolerance:g}). Serve without it."
        )


def capture_graphs(
    runner: ModelRunner,
    capture: Capture,
    *,
    max_num_seqs: int,
    max_model_len: int,
    num_pages: int,
    vocab_size: int,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Capture the decode steps of all sizes, and check that each says what it says without a graph.

    Args:
        runner: Of a model whose pages are nobody's yet.
        capture: Makes a graph.
        max_num_seqs: The largest batch.
        max_model_len: The longest sequence, in tokens.
        num_pages: Of the runner.
        vocab_size: Of the model.
        dtype: Of the model.
        progress: Told what is going on.

    Raises:
        GraphError: They are no use for this model, and the message says why; the runner is left without.
    """
    ids = [(7919 * i + 13) % vocab_size for i in range(2 * max_num_seqs)]

    def step(position: int, num_seqs: int) -> list[Chunk]:
        tokens = ids[position * num_seqs :]
        return [Chunk(tokens[i : i + 1], position, [i], 1) for i in range(num_seqs)]

    try:
        sizes = runner.use_graphs(capture, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
        for i, size in enumerate(reversed(sizes)):  # the largest first: the others find room in its memory
            progress(f"capturing decode steps as graphs: batch {size} ({i + 1} of {len(sizes)})")
            num_seqs = min(size if size - 1 in (0, *sizes) else size - 1, num_pages)  # filled up where there is a gap
            runner.run(step(0, num_seqs))
            stock = runner.run(step(1, num_seqs), graphs=False)
            error = _error(list(runner.run(step(1, num_seqs))), list(stock))
            if not error <= (tolerance := _TOLERANCE[dtype]):
                raise GraphError(f"logits of batch {size} are {error:.2g} standard deviations off (of {tolerance:g})")
    except Exception as e:
        runner.drop_graphs()
        raise e if isinstance(e, GraphError) else GraphError(f"{type(e).__name__}: {e}") from e


def _native(model: nn.Module, config: EngineConfig, layers: dict[int, LayerSpec], max_model_len: int) -> NativeDecoder:
    """The model with its weights packed."""
    if not config.native:
        raise NotNativeError("native kernels are switched off")
    if config.tensor_parallel_size > 1:
        raise NotNativeError(f"its weights are spread over {config.tensor_parallel_size} ranks")
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise NotNativeError(f"it is on {parameter.device}")
    stored: dict[torch.dtype, WeightType] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    if parameter.dtype not in stored:
        raise NotNativeError(f"its weights are {parameter.dtype}; float32 and bfloat16 are covered")
    try:
        return NativeDecoder(read_weights(model, layers, max_model_len), config.quantization or stored[parameter.dtype])
    except (AttributeError, ValueError) as e:  # modules named or shaped unlike their family's
        raise NotNativeError(str(e)) from e


@contextmanager
def _quick_products(model: nn.Module) -> Iterator[None]:
    """Have linear layers computed in float32 where the CPU's own half precision would take minutes."""
    parameter = next(model.parameters())
    slow = parameter.device.type == "cpu" and parameter.dtype != torch.float32 and not fast_bfloat16()
    # A sharded layer has a forward of its own, in which ranks meet.
    linears = [m for m in model.modules() if slow and type(m) is nn.Linear and "forward" not in vars(m)]
    for module in linears:
        module.forward = partial(_float_linear, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in linears:
            del module.forward


def _float_linear(module: nn.Linear, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    return F.linear(x.float(), module.weight.float(), bias).to(x.dtype)


def _error(seen: Seq[Tensor], expected: Seq[Tensor]) -> float:
    """The largest difference between logits, in standard deviations of the expected ones."""
    return max(((a - b).abs().max() / b.std().clamp_min(1e-6)).item() for a, b in zip(seen, expected, strict=True))


def _refusal(model: nn.Module, name: str, reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"{name} ({type(model).__name__}) is not supported: {reason}. Served through paged attention it would "
        "answer wrongly. Supported are decoder-only models whose attention goes through transformers' "
        "AttentionInterface with full or sliding-window attention."
    )


def _prompts(vocab_size: int) -> list[list[int]]:
    """Two prompts with a common prefix of two pages, and one of their own; token ids spread over the vocabulary."""
    ids = [(7919 * i + 13) % vocab_size for i in range(1, 64)]
    return [ids[:37], ids[:32] + ids[45:50], ids[40:57]]


def _stock_logits(model: nn.Module, prompt: list[int]) -> Tensor:
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits
    return logits[0, -1].float()


def _discover(model: nn.Module) -> BatchContext:
    """Run two tokens through the model to see which layers call the paged attention, and with which shapes."""
    config: Any = model.config
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    device = next(model.parameters()).device
    with current_batch(BatchContext()) as batch:
        model(
            input_ids=torch.tensor([[0, 1]], device=device),
            position_ids=torch.tensor([[0, 1]], device=device),
            use_cache=False,
        )
    expected = config.get_text_config().num_hidden_layers
    if len(batch.seen) != expected:
        raise UnsupportedAttentionError(
            f"{len(batch.seen)} of its {expected} layers go through the replaceable attention"
        )
    return batch


def _check_layers(
    model: Any,
    forward: ForwardPass,
    seen: BatchContext,
    prompts: list[list[int]],
    profile: ProfileOf,
    attention_backend: str | None,
    tolerance: float,
) -> None:
    """Compare stock and paged layers given the same inputs: see `layerwise`.

    Raises:
        UnsupportedAttentionError: They differ by more than rounding.
    """
    trace = LayerTrace(model, seen.modules)
    model.set_attn_implementation("eager")
    try:
        for i, prompt in enumerate(prompts):
            with trace.record([(i, position) for position in range(len(prompt))]):
                _stock_logits(model, prompt)
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    _paged_logits(model, forward, seen.seen, prompts, profile, attention_backend, trace.compare)
    found = trace.difference()
    for what, error in (("attention", found.attention), ("decoder", found.rest)):
        if not error <= tolerance:
            raise UnsupportedAttentionError(
                f"on a probe one of its {what} layers is off by {error:.2g} standard deviations "
                f"(accepted: {tolerance:g})"
            )


def _paged_logits(
    model: nn.Module,
    forward: ForwardPass,
    layers: dict[int, LayerSpec],
    prompts: list[list[int]],
    profile: ProfileOf,
    attention_backend: str | None = None,
    around: Callable[[Rows], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> list[Tensor]:
    """The same prompts as one ragged batch: chunked, with a shared prefix, and with a decode step at the end.

    Each step runs within ``around(its rows)``.
    """
    parameter = next(model.parameters())
    runner = ModelRunner(
        forward,
        layers,
        num_pages=8,
        page_size=16,
        dtype=parameter.dtype,
        device=parameter.device,
        profile=profile,
        attention_backend=attention_backend,
    )
    tables = [[5, 2, 7], [5, 2, 1], [4, 0]]

    def run(*parts: tuple[int, int, int | None], sample: bool) -> Tensor:
        """A step of `prompts[i][start:stop]` each."""
        chunks = [Chunk(prompts[i][start:stop], start, tables[i], sample) for i, start, stop in parts]
        rows = [
            (i, start + j)
            for (i, start, _), chunk in zip(parts, chunks, strict=True)
            for j in range(len(chunk.token_ids))
        ]
        with around(rows):
            return runner.run(chunks)

    last = len(prompts[2]) - 1
    run((0, 0, 20), (2, 0, last), sample=False)
    return list(run((0, 20, None), (1, 32, None), (2, last, None), sample=True))

"""Getting a model and its tokenizer: from a local folder, the hub, or random weights of a real shape."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macaw_server.config import EngineConfig
from macaw_server.errors import ConfigError, ModelLoadError
from macaw_server.models import hub
from macaw_server.models.sharding import shard, sharding

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

DEMO_MODEL = "macaw-demo"
DEMO_FOLDER = Path(__file__).with_name("demo")
Progress = Callable[[str], None]

_constructing = threading.Lock()
"""Held while a model is constructed: until then torch's default dtype, its random state and its initialisers are what
transformers makes of them, and they are the whole process's."""


def resolve(config: EngineConfig) -> str:
    """The folder or hub name that holds `config.model`; the cached folder where the hub cannot be reached.

    Raises:
        ModelLoadError: A path that does not exist, a folder without a model in it, or a hub that cannot be reached.
    """
    if config.model == DEMO_MODEL:
        return str(DEMO_FOLDER)
    path = Path(config.model).expanduser()
    if path.is_dir():
        _check_folder(path, config.load_format)
        return str(path)
    if path.exists():
        raise ModelLoadError(
            f"{config.model} is a file. Give the folder that holds config.json, the weights (*.safetensors) "
            "and the tokenizer."
        )
    if config.model.startswith((".", "/", "~")) or config.model.count("/") > 1:
        raise ModelLoadError(
            f"No folder {config.model}. Give an existing folder, a hub name (org/model), or {DEMO_MODEL}."
        )
    cached = hub.snapshot(config.model, config.revision)
    if cached is None:
        return config.model
    _check_folder(cached, config.load_format)
    return str(cached)


def _check_folder(path: Path, load_format: str) -> None:
    """Refuse a folder from which a model cannot be read, naming every file that is missing."""
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{path} has no config.json, so it is not a model folder.")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise ModelLoadError(f"{path / 'config.json'} is not valid JSON: {e}.") from e
    if load_format == "dummy":
        return
    for index in path.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise ModelLoadError(
                f"{path} is incomplete: {index.name} lists {len(shards)} files, of which {len(missing)} are "
                f"missing: {', '.join(missing[:5])}. Download the model again."
            )
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ModelLoadError(
            f"{path} has no weights: *.safetensors (or pytorch_model*.bin) are missing. Download the model again, "
            "or use --load-format dummy for random weights."
        )


def load_config(config: EngineConfig) -> Any:
    """Transformers' configuration of the text model; refuses what is not a decoder-only language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        hf = AutoConfig.from_pretrained(resolve(config), revision=config.revision)
    except ModelLoadError:
        raise
    except Exception as e:
        raise _cannot_read(config, e) from e
    if getattr(hf, "is_encoder_decoder", False) or type(hf) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelLoadError(
            f"{config.model} is of type {hf.model_type!r}, which transformers does not run as a causal language "
            "model. Macaw serves decoder-only models, such as Llama, Qwen, Mistral, Gemma or GPT-OSS."
        )
    text = hf.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if getattr(text, "attention_chunk_size", None):
        kinds.add("chunked_attention")
    if kinds:
        raise ModelLoadError(
            f"{config.model} ({hf.model_type}) has layers of kind {', '.join(sorted(kinds))}. Macaw's paged "
            "attention computes full_attention and sliding_attention; with others it would answer wrongly."
        )
    return hf


def _cannot_read(config: EngineConfig, error: Exception) -> ModelLoadError:
    lines = str(error).strip().splitlines()
    return ModelLoadError(
        f"Cannot load {config.model}: {lines[0] if lines else type(error).__name__}\n"
        f"Accepted: a folder with config.json, weights and tokenizer; a hub name that can be reached; {DEMO_MODEL}."
    )


def load_tokenizer(config: EngineConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelLoadError: None there, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(config), revision=config.revision)
    except ModelLoadError:
        raise
    except Exception as e:
        raise ModelLoadError(
            f"Cannot load the tokenizer of {config.model}: {str(e).strip().splitlines()[0]}\n"
            "The model folder needs tokenizer.json (or the files of a slow tokenizer) and tokenizer_config.json."
        ) from e
    return tokenizer


def load_model(
    config: EngineConfig, hf: Any, device: torch.device, dtype: torch.dtype, progress: Progress
) -> nn.Module:
    """The model in eval mode, with transformers' own (eager) attention for now; of several ranks, this one's shard.

    Raises:
        ModelLoadError: The weights cannot be read, or do not cover the model.
        ConfigError: The model cannot be spread over the ranks.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # `progress` tells the same
    distributed = sharding(config, hf)
    if config.load_format == "dummy":
        progress(f"making random weights for {config.model}")
        # The caller's random state is none of our business.
        with _constructing, torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation="eager")
        if distributed:
            return shard(model, distributed).eval()
        return model.to(device).eval()  # type: ignore[no-any-return]
    files = [f for pattern in ("*.safetensors", "*.bin") for f in Path(resolve(config)).glob(pattern)]
    size = f" ({sum(f.stat().st_size for f in files) / 1e6:,.0f} MB)" if files else ""
    progress(f"reading the weights of {config.model}{size}")
    try:
        with _constructing:
            model, report = AutoModelForCausalLM.from_pretrained(
                resolve(config),
                revision=config.revision,
                config=hf,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
                **distributed,
            )
    except Exception as e:
        raise _cannot_read(config, e) from e
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{config.model} is incomplete: {len(missing)} weights of {type(model).__name__} are not in its files, "
            f"such as {', '.join(missing[:3])}. Download the model again."
        )
    return (model if distributed else model.to(device)).eval()  # type: ignore[no-any-return]


def context_limit(hf: Any) -> int | None:
    """The longest context at which every sequence of a mixed batch gets the answer it would get alone, in tokens.

    Dynamic and long RoPE change their frequencies for the whole batch once one sequence is longer than the original
    context, so such models are served up to that.
    """
    text = hf.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            limit = min(x for x in (limit, original) if x is not None)
    return limit


def max_model_len(config: EngineConfig, hf: Any) -> int:
    """The context to serve, in tokens; `config.max_model_len` may lower the model's own limit, not raise it."""
    limit = context_limit(hf)
    if limit is None:
        if config.max_model_len is None:
            raise ConfigError(f"{config.model} does not say how long its context is. Give --max-model-len.")
        return config.max_model_len
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"--max-model-len {config.max_model_len:,} is over the {limit:,} tokens of context with which "
            f"{config.model} answers correctly. Give at most {limit}."
        )
    return config.max_model_len or limit


def eos_token_ids(config: EngineConfig, model: nn.Module) -> frozenset[int]:
    """End-of-sequence ids: of the generation config where there is one, else of the model's config."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(resolve(config), revision=config.revision).eos_token_id
    except OSError:
        hf: Any = model.config
        ids = hf.get_text_config().eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)

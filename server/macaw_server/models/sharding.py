"""Spreading a model's weights over ranks, by the tensor-parallel plan that it has in transformers."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from torch import nn

from macaw_server.config import EngineConfig
from macaw_server.errors import ConfigError


def sharding(config: EngineConfig, hf: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that make it read this rank's shard only; none for one rank.

    Args:
        config: Says how many ranks there are.
        hf: Transformers' configuration of the model.

    Raises:
        ConfigError: The model cannot be spread over so many ranks.
    """
    if config.tensor_parallel_size == 1:
        return {}
    from transformers import __version__ as version
    from transformers.distributed import DistributedConfig

    if config.quantization is not None:
        raise ConfigError(
            f"--quantization {config.quantization} needs the native CPU decoder, which runs on one rank. "
            f"Serve without it, or without {_flag(config)}."
        )
    if find_spec("accelerate") is None:  # transformers asks for it
        raise ConfigError(f"{_flag(config)} needs the package accelerate: pip install accelerate")
    if "tp_size" not in DistributedConfig.__dataclass_fields__:
        raise ConfigError(f"{_flag(config)} needs a later transformers than {version}: pip install -U transformers")
    _check_plan(config, hf)
    return {"distributed_config": DistributedConfig(tp_size=config.tensor_parallel_size)}


def shard(model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """This rank's shard of a model that every rank has in its memory as a whole.

    Args:
        model: With the same weights on all ranks.
        arguments: From `sharding`.
    """
    kind, hf = type(model), model.config
    sharded: nn.Module = kind.from_pretrained(  # type: ignore[attr-defined]
        None, config=hf, state_dict=model.state_dict(), dtype=hf.dtype, attn_implementation="eager", **arguments
    )
    return sharded


def _check_plan(config: EngineConfig, hf: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as version

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    plan: dict[str, str] = model.tp_plan
    if not any("*" in name for name in plan):  # the output projection alone is not worth a rank
        raise ConfigError(
            f"{config.model} ({type(model).__name__}) has no tensor-parallel plan for its layers in transformers "
            f"{version}, so {_flag(config)} cannot spread it. Serve it with --tensor-parallel-size 1."
        )
    text = hf.get_text_config()
    num_heads: int = text.num_attention_heads
    num_kv_heads: int = getattr(text, "num_key_value_heads", None) or num_heads
    common = math.gcd(num_heads, num_kv_heads)
    by_head = any(style == "colwise" and "attn" in name for name, style in plan.items())
    if by_head and common % config.tensor_parallel_size:
        accepted = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ConfigError(
            f"{_flag(config)} does not divide the {num_heads} attention heads and {num_kv_heads} KV heads of "
            f"{config.model}. Accepted: {accepted}."
        )


def _flag(config: EngineConfig) -> str:
    return f"--tensor-parallel-size {config.tensor_parallel_size}"

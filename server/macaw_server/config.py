"""The one configuration object: command-line flags and ``MACAW_*`` variables derive from these fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(value: object) -> object:
    """Bytes from ``4GiB``, ``512M``, ``1.5g`` or a plain number; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes or a number with K, M, G or T, such as 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value


Bytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


class EngineConfig(BaseModel):
    """What one engine needs to know; picklable, handed to the engine's process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="macaw-demo", description="Local folder, hub name, or macaw-demo (a very small one, for trying Macaw)."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto: read the weights. dummy: random weights of the real shape, for benchmarks.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks that share the model: each is a process with a part of the weights and KV heads, on a GPU "
        "of its own or a share of the CPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: bfloat16 where it is fast (GPUs, native CPU kernels, CPUs with bfloat16), else float32.",
    )
    max_model_len: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Prompt plus output, in tokens; default: what the model was made for."
    )
    kv_memory: Bytes | None = Field(
        default=None,
        description="Memory for the KV pages of each rank, such as 4GiB; default: a share of what is free.",
    )
    page_size: Annotated[int, Field(ge=1, le=256), AfterValidator(_power_of_two)] = Field(
        default=16, description="Tokens per KV page."
    )
    max_num_seqs: int = Field(default=64, ge=1, description="Sequences in one batch at most.")
    max_num_batched_tokens: int = Field(
        default=512, ge=1, description="Token budget of one step: longer prompts are prefilled in chunks."
    )
    policy: Literal["fcfs", "app"] = Field(default="app", description="Scheduling policy.")
    task_groups: bool = Field(
        default=True,
        description="Policy app: calls that feed one consumer count as a group, of which only the end of the last one "
        "matters; off: each counts like a call by itself.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Keep the KV of prompts and answers for prompts that begin so; off: every prompt is computed as a "
        "whole, and nothing ahead.",
    )
    single_flight: bool = Field(
        default=True,
        description="A prefix that several calls need at once is computed by one of them, and the others wait; off: "
        "by each of them.",
    )
    eviction: Literal["value", "lru"] = Field(
        default="value",
        description="Cached prefixes that go first when pages are needed: by who will need them, or by last use.",
    )
    latency_slowdown: float = Field(
        default=4.0,
        ge=1,
        description="Policy app: while latency-critical calls decode, others ride along as far as a step gets at most "
        "so many times longer.",
    )
    sharing: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Two-phase attention over shared prefixes: by cost model, or forced, or off.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="CUDA: decode steps are captured at start and launched as a whole; needs some seconds and memory.",
    )
    overlap: bool | None = Field(
        default=None,
        description="Schedule and launch a step while the one before it runs; default: on GPUs.",
    )
    torch_compile: bool = Field(
        default=False,
        description="torch.compile for transformers' modules: a slow start, and what it brings was not measured.",
    )
    native: bool = Field(
        default=True,
        description="CPU: own kernels in C++, compiled on first use, for whatever of the model they cover.",
    )
    quantization: Literal["int8"] | None = Field(
        default=None,
        description="int8: weights in 8 bits, one scale per output channel (CPU; faster at small batches).",
    )
    speculative_tokens: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Draft tokens by prompt lookup, per sequence and step at most; 0: no speculative decoding.",
    )
    speculative_ridge: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Tokens of a step that cost as much to compute as the weights cost to read: "
        "the fewer, the surer a draft must be; default: measured.",
    )
    ahead_rows: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Prompts of calls to come are prefilled beside other work in steps of up to so many tokens, "
        "and else when there is none; default: measured on CPUs, 64 on GPUs.",
    )
    engines: int = Field(
        default=1,
        ge=1,
        description="Engines on this machine, each a process with the model; they split --threads and --kv-memory.",
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="CPU threads of the engine; default: all cores, or 1 for a tiny model."
    )
    seed: int = Field(default=0, description="Seed of dummy weights.")


class ServerConfig(EngineConfig, BaseSettings):
    """Everything `macaw serve` takes."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="MACAW_", env_ignore_empty=True, cli_parse_args=False
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: tuple[str, ...] = Field(
        default=(), description="Accept this key; repeat for several tenants. None: no key is asked for."
    )
    tenants: Path | None = Field(
        default=None, description="TOML file with tenants by name, each with its API keys and perhaps a weight."
    )
    shared_prefix: tuple[Path, ...] = Field(
        default=(),
        description="File with text that is no secret, a system message or the start of prompts: its K/V is shared by "
        "all tenants; repeat for several.",
    )
    served_model_name: str | None = Field(default=None, description="Name that clients use; default: the model's own.")
    tool_call_parser: (
        Literal[
            "hermes",
            "qwen3_coder",
            "llama3_json",
            "mistral",
            "mistral_args",
            "deepseek_v3",
            "deepseek_v31",
            "granite",
            "pythonic",
        ]
        | None
    ) = Field(
        default=None, description="How the model writes calls of tools; default: as its chat template writes them."
    )
    max_body_size: Bytes = Field(default=32 * 2**20, description="Largest request body, such as 32MiB.")
    max_live_calls: int = Field(default=4096, ge=1, description="Calls waiting or running; more are refused with 429.")
    placement: Literal["affinity", "least-loaded"] = Field(
        default="affinity",
        description="Which of several engines gets a call: by cached prefix and estimated work, or by the number of "
        "its calls alone.",
    )
    prefill_ahead: bool = Field(
        default=True, description="Prefill the constant beginnings of prompts that still wait for a variable."
    )
    pipelining: bool = Field(
        default=True, description="Prefill a call's prompt while the answer that it waits for is still being written."
    )
    shutdown_timeout_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that running programs get to end on SIGTERM before they are cancelled.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Log level.")

    @field_validator("shared_prefix")
    @classmethod
    def _is_cached(cls, paths: tuple[Path, ...], info: ValidationInfo) -> tuple[Path, ...]:
        if paths and not info.data.get("prefix_caching", True):
            raise ValueError("nothing is shared with --no-prefix-caching; leave out one of the two")
        return paths

    def engine(self) -> EngineConfig:
        """The engine's part."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.model_fields})

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        if self.served_model_name:
            return self.served_model_name
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

"""The nouns of the service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from macaw_server.engine.types import Engine
from macaw_server.programs.rendering import Tokenizer


class NamedTenant(NamedTuple):
    """A tenant as the operator declares it; any of its keys is as good as another."""

    name: str
    keys: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Limits of the service.

    Attributes:
        api_keys: Accepted keys, one tenant each.
        tenants: Tenants with names, keys and weights. Without these and keys everybody is one, anonymous tenant.
        max_body_bytes: Largest request body.
        max_live_calls: Calls of unfinished programs, with `n` choices counted as `n`; more are refused with
            `overloaded`.
        max_kept_programs: Finished programs that can still be asked for.
        max_kept_events: The same bound in events, for what a program costs in memory is its events.
        kept_s: How long a finished program can be asked for at most, seconds.
        idle_s: How long a program waits for its client (a variable, growth) before it is given up, seconds.
        ping_s: Seconds between the comments that keep an event stream's connection alive.
        prefill_ahead: Warm the cache with the constant beginnings of prompts that still wait for a variable.
        pipelining: Go on with that as far as the answers go that these wait for.
    """

    api_keys: tuple[str, ...] = ()
    tenants: tuple[NamedTenant, ...] = ()
    max_body_bytes: int = 32 * 2**20
    max_live_calls: int = 4096
    max_kept_programs: int = 256
    max_kept_events: int = 200_000
    kept_s: float = 600.0
    idle_s: float = 600.0
    ping_s: float = 15.0
    prefill_ahead: bool = True
    pipelining: bool = True


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under the name that clients use.

    Attributes:
        name: The name.
        tokenizer: Its tokenizer, with the chat template.
        engine: Who runs it.
        created: Unix seconds.
        tool_call_parser: Name of the form in which it writes calls; None: that which its chat template writes.
    """

    name: str
    tokenizer: Tokenizer
    engine: Engine
    created: int
    tool_call_parser: str | None = None


class Tenant(NamedTuple):
    """Whose request it is. No field reveals the key.

    Attributes:
        id: Its name, where it has one.
        salt: Its KV cache namespace.
        weight: Its share of engine and queue relative to other tenants that have work.
    """

    id: str
    salt: str
    weight: float = 1.0

"""API keys: who may ask, which cached text is theirs, and what share they have."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from macaw.errors import UnauthorizedError
from macaw_server.errors import ConfigError
from macaw_server.service.types import NamedTenant, Tenant

ANONYMOUS = Tenant(id="anonymous", salt="")
"""The one tenant of a server without keys."""


class Tenants:
    """Finds the tenant of a request.

    The salt is HMAC-SHA256(server secret, key or name): nothing that a client sends can choose another tenant's, and
    knowing it does not give the key away.

    Args:
        api_keys: Accepted keys, one tenant each.
        named: Tenants with names.
        secret: The server's; a new one at every start is right while the cache does not outlive the server.

    Raises:
        ConfigError: A key belongs to two tenants.
    """

    def __init__(self, api_keys: Sequence[str], named: Sequence[NamedTenant] = (), secret: bytes | None = None) -> None:
        secret = secret or secrets.token_bytes(32)
        self._tenants: dict[bytes, Tenant] = {}
        for key in dict.fromkeys(api_keys):
            salt = _salt(secret, f"key:{key}")
            self._add(key, Tenant(id=hashlib.sha256(salt.encode()).hexdigest()[:16], salt=salt))
        for name, keys, weight in named:
            for key in keys:
                self._add(key, Tenant(name, _salt(secret, f"name:{name}"), weight))

    def __len__(self) -> int:
        return len(set(self._tenants.values()))

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant for an ``Authorization`` header. Takes the same time whichever key is right.

        Raises:
            UnauthorizedError: The header is missing, of another scheme, or with an unknown key.
        """
        if not self._tenants:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            seen = "no Authorization header" if authorization is None else "an Authorization header of another form"
            raise UnauthorizedError(
                f"This server asks for an API key, and got {seen}. Send: Authorization: Bearer KEY."
            )
        digest, found = _digest(key.strip()), None
        for expected, tenant in self._tenants.items():
            if hmac.compare_digest(digest, expected):
                found = tenant
        if found is None:
            raise UnauthorizedError("The API key is not one of this server's. Check it, or ask who runs the server.")
        return found

    def _add(self, key: str, tenant: Tenant) -> None:
        digest = _digest(key)
        if (other := self._tenants.setdefault(digest, tenant)) != tenant:
            raise ConfigError(f"Tenants {other.id!r} and {tenant.id!r} have the same API key. Give each its own.")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


_FILE = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], _Entry])


def read_tenants(path: Path) -> tuple[NamedTenant, ...]:
    """The tenants of a TOML file: a table for each, with `keys` and perhaps a `weight`.

    Raises:
        ConfigError: It cannot be read, or is of another form. No message holds a key.
    """
    try:
        entries = _FILE.validate_python(tomllib.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"--tenants {path} cannot be read: {e}.") from e
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
        raise ConfigError(
            f'--tenants {path}: {wrong}. Write for each tenant: [name], keys = ["..."], and perhaps weight = 2.'
        ) from e
    return tuple(NamedTenant(name, entry.keys, entry.weight) for name, entry in entries.items())


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that a comparison does not tell the length."""
    return hashlib.sha256(key.encode()).digest()


def _salt(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()

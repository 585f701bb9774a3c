"""API keys: who may ask, and which cached text is theirs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from macaw.errors import UnauthorizedError
from macaw_server.service.types import Tenant

ANONYMOUS = Tenant(id="anonymous", salt="")
"""The one tenant of a server without keys."""


class Tenants:
    """Finds the tenant of a request.

    The salt is HMAC-SHA256(server secret, key): nothing that a client sends can choose another tenant's, and
    knowing it does not give the key away.

    Args:
        api_keys: Accepted keys.
        secret: The server's; a new one at every start is right while the cache does not outlive the server.
    """

    def __init__(self, api_keys: Sequence[str], secret: bytes | None = None) -> None:
        secret = secret or secrets.token_bytes(32)
        self._tenants = [(_digest(key), _tenant(key, secret)) for key in api_keys]

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
        for expected, tenant in self._tenants:
            if hmac.compare_digest(digest, expected):
                found = tenant
        if found is None:
            raise UnauthorizedError("The API key is not one of this server's. Check it, or ask who runs the server.")
        return found


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that a comparison does not tell the length."""
    return hashlib.sha256(key.encode()).digest()


def _tenant(key: str, secret: bytes) -> Tenant:
    salt = hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()
    return Tenant(id=hashlib.sha256(salt.encode()).hexdigest()[:16], salt=salt)

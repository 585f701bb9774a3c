"""The Starlette app: OpenAI's endpoints, programs, server-sent events, metrics."""

from macaw_server.http.app import create_app

__all__ = ["create_app"]

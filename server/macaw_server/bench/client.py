"""One server under measurement: streamed completions of token ids, timed by chunk, and checked before they count."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import httpx

from macaw._sse import SSEDecoder
from macaw_server.bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request took.

    Attributes:
        first_chunk_s: From sending the burst to the first text (time to first token).
        gaps_s: Between one text chunk and the next (inter-token latency).
        seconds: From sending the burst to the end of this stream.
        cached_tokens: Prompt tokens that the server says it found in its cache.
    """

    first_chunk_s: float
    gaps_s: list[float]
    seconds: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that were sent at once, and how many tokens of answer they had together."""

    output_tokens: int
    answers: list[Answer]

    @property
    def seconds(self) -> float:
        """From sending them to the end of the last."""
        return max(answer.seconds for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests over the time of all."""
        return self.output_tokens / self.seconds


class Side:
    """A client of one OpenAI-compatible server; use it in an ``async with``.

    Args:
        name: For tables and messages.
        url: With or without ``/v1``.
        api_key: Sent as a bearer token.
        timeout_s: Without a sign of life for this long, a request has failed.
        transport: Another way than sockets, for tests.

    Attributes:
        model: Its first model; known after ``async with`` is entered.
        software: What the server calls itself in its headers.
    """

    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None = None,
        timeout_s: float = 1800.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name, self.url = name, url.rstrip("/").removesuffix("/v1")
        self.model = self.software = ""
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx.Timeout(timeout_s, connect=10),
            # A connection for each request: one that was kept may be closed by the server just as it is used again.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        """Ask for the model.

        Raises:
            BenchError: Nobody answers there.
        """
        try:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            self.model = response.json()["data"][0]["id"]
            self.software = response.headers.get("server", "unknown")
        except (httpx.HTTPError, ValueError, LookupError) as e:
            await self._http.aclose()
            raise BenchError(
                f"{self.name}: {self.url}/v1/models does not list a model ({type(e).__name__}: {e}). "
                "Give the URL of a running OpenAI-compatible server."
            ) from e
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def burst(self, prompts: Sequence[Sequence[int]], output_len: int) -> Burst:
        """Send all prompts at once, and wait for the last.

        Raises:
            BenchError: A request failed, or did not have the tokens that were asked for.
        """
        start = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._complete(prompt, output_len, start)) for prompt in prompts]
        except ExceptionGroup as e:
            raise e.exceptions[0] from None
        return Burst(output_len * len(prompts), [task.result() for task in running])

    async def _complete(self, prompt: Sequence[int], output_len: int, start: float) -> Answer:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    text = (await response.aread()).decode(errors="replace")
                    raise BenchError(f"{self.name} answered {response.status_code}: {text[:500]}")
                # Only noted here, and read at the end: now the servers need the processor.
                received = [(time.perf_counter(), chunk) async for chunk in response.aiter_raw()]
        except httpx.HTTPError as e:
            raise BenchError(f"{self.name} failed in mid-request: {type(e).__name__}: {e}") from e
        return self._check(received, len(prompt), output_len, start)

    def _check(self, received: list[tuple[float, bytes]], prompt_len: int, output_len: int, start: float) -> Answer:
        """Read what was received, and hold it to the work that was asked for."""
        decoder = SSEDecoder()
        times: list[float] = []
        usage: dict[str, Any] = {}
        for at, chunk in received:
            for event in decoder.feed(chunk):
                if event.data == "[DONE]":
                    continue
                content = json.loads(event.data)
                if "error" in content:
                    raise BenchError(f"{self.name} failed in mid-stream: {content['error']}")
                usage = content.get("usage") or usage
                if any(choice.get("text") for choice in content["choices"]):
                    times.append(at)
        for kind, expected in (("prompt", prompt_len), ("completion", output_len)):
            if (seen := usage.get(f"{kind}_tokens")) != expected:
                raise BenchError(
                    f"{self.name} reports {seen} {kind} tokens where {expected} were asked for: it did other work "
                    "than the other side, and the two cannot be compared."
                )
        if not times:
            raise BenchError(f"{self.name} streamed no text. Choose other token ids for the prompts (--ids).")
        details = usage.get("prompt_tokens_details") or {}
        gaps = [after - before for before, after in pairwise(times)]
        return Answer(times[0] - start, gaps, received[-1][0] - start, details.get("cached_tokens") or 0)

"""The ways of asking a model, each as a function that returns its responses: one, or those of a stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from llama_index.core.llms import ChatMessage

from llama_index.llms.macaw import Macaw
from llama_index_macaw.observing import run_async

MESSAGES = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content="Hello, you")]


async def gathered(stream: Awaitable[Any]) -> list[Any]:
    return [chunk async for chunk in await stream]


WAYS: dict[str, Callable[[Macaw], list[Any]]] = {
    "chat": lambda llm: [llm.chat(MESSAGES)],
    "complete": lambda llm: [llm.complete("Hello, you")],
    "stream_chat": lambda llm: list(llm.stream_chat(MESSAGES)),
    "stream_complete": lambda llm: list(llm.stream_complete("Hello, you")),
    "achat": lambda llm: [run_async(llm.achat(MESSAGES))],  # type: ignore[arg-type]
    "acomplete": lambda llm: [run_async(llm.acomplete("Hello, you"))],  # type: ignore[arg-type]
    "astream_chat": lambda llm: run_async(gathered(llm.astream_chat(MESSAGES))),
    "astream_complete": lambda llm: run_async(gathered(llm.astream_complete("Hello, you"))),
}


def text_of(response: Any) -> str:
    return response.text if hasattr(response, "text") else response.message.content

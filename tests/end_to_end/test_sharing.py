"""A shared prefix is computed once, however its requests arrive."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from openai import AsyncOpenAI

from conftest import TENANTS
from macaw_server.serve import LocalServer

NUM_REQUESTS = 32
PAGE = 16


async def counters(url: str) -> dict[str, float]:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TENANTS[0]}"})).text
    return {
        name: float(re.search(rf'^macaw_{name}_total{{model="macaw-demo"}} (\S+)', text, re.MULTILINE)[1])
        for name in ("prompt_tokens", "cached_prompt_tokens", "computed_prompt_tokens")
    }


@pytest.mark.parametrize("at_once", [True, False])
async def test_32_requests_compute_their_prefix_once(local_server: LocalServer, at_once: bool) -> None:
    prefix = f"{'At the same instant' if at_once else 'One by one'}: " + "a long shared preamble, " * 60
    before = await counters(local_server.url)
    async with AsyncOpenAI(base_url=f"{local_server.url}/v1", api_key=TENANTS[0]) as api:

        async def ask(i: int) -> tuple[int, int]:
            answer = await api.completions.create(
                model="macaw-demo", prompt=f"{prefix}question {i}", max_tokens=4, temperature=0
            )
            return answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens

        if at_once:
            usage = await asyncio.gather(*(ask(i) for i in range(NUM_REQUESTS)))
        else:
            usage = [await ask(i) for i in range(NUM_REQUESTS)]
    after = await counters(local_server.url)

    computed = sorted(prompt - cached for prompt, cached in usage)
    shared = min(prompt for prompt, _ in usage) // PAGE * PAGE
    assert computed[-1] >= shared, "one request computes the prefix"
    assert computed[-2] < 2 * PAGE, "and no other computes more than its own last pages"
    spent = {name: after[name] - before[name] for name in after}
    assert spent["prompt_tokens"] == sum(prompt for prompt, _ in usage)
    assert spent["cached_prompt_tokens"] == sum(cached for _, cached in usage)
    assert spent["computed_prompt_tokens"] == sum(computed), "what was not cached was computed, once"

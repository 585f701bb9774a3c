"""Two tenants with the same prompt: nothing of one is found by the other, but what the operator has declared."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from macaw_server.serve import LocalServer
from noise import NOISE

KEYS = ("key-a", "key-b")
PAGE = 16
SYSTEM = "You are the assistant of a company with a long preamble. " * 12
SECRET = "The tenant's own text, which the other one happens to send too. " * 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    path = tmp_path_factory.mktemp("shared") / "system.txt"
    path.write_text(SYSTEM)
    config = {**NOISE, "dtype": "float32", "max_model_len": 2048, "page_size": PAGE}
    with LocalServer(**config, api_key=KEYS, shared_prefix=[path]) as server:
        yield server


def post(server: LocalServer, key: str, body: dict[str, object], **headers: str) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    headers["authorization"] = f"Bearer {key}"
    return httpx.post(server.url + path, json={"max_tokens": 1, "temperature": 0, **body}, headers=headers, timeout=60)


def cached(server: LocalServer, key: str, body: dict[str, object], **headers: str) -> int:
    usage = post(server, key, body, **headers).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_the_same_prompt_shares_nothing(server: LocalServer) -> None:
    body: dict[str, object] = {"prompt": SECRET + "one"}
    assert [cached(server, key, body) for key in (KEYS[0], KEYS[1])] == [0, 0]
    assert all(cached(server, key, body) > len(SECRET) // 8 for key in KEYS), "each finds its own"


@pytest.mark.parametrize("field", ["salt", "cache_salt", "tenant", "prompt_cache_key", "cache_namespace"])
def test_a_forged_salt_is_refused_or_changes_nothing(server: LocalServer, field: str) -> None:
    body: dict[str, object] = {"prompt": f"With {field}: {SECRET}"}
    assert cached(server, KEYS[0], body) == 0
    assert server.service is not None
    salt = server.service.tenants.authenticate(f"Bearer {KEYS[0]}").salt
    for forged in ({field: salt}, {"macaw": {field: salt}}, {"extra_body": {field: salt}}):
        response = post(server, KEYS[1], body | forged)
        assert response.status_code == 400
        assert field in response.json()["error"]["message"] or "extra_body" in response.json()["error"]["message"]
    headers = {f"x-{field.replace('_', '-')}": salt, "x-macaw-salt": salt, "x-tenant": KEYS[0]}
    hints = {"macaw": {"app": salt, "group": salt}, "user": salt}
    assert cached(server, KEYS[1], body | hints, **headers) == 0


def test_the_operators_prefix_is_shared_and_nothing_behind_it(server: LocalServer) -> None:
    def chat(*contents: str) -> dict[str, object]:
        roles = ("system", "user")
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}

    first = cached(server, KEYS[0], chat(SYSTEM, SECRET))
    shared = cached(server, KEYS[1], chat(SYSTEM, SECRET))
    assert first == 0
    assert shared % PAGE == 0
    assert shared > len(SYSTEM) // 8
    assert cached(server, KEYS[1], chat(SYSTEM, "Something else")) == shared
    assert cached(server, KEYS[1], chat(SYSTEM, SECRET)) > shared + len(SECRET) // 8, "its own, behind it"
    raw = [cached(server, key, {"prompt": SYSTEM + SECRET}) for key in KEYS]
    assert raw[0] == 0
    assert raw[1] > len(SYSTEM) // 8


def test_answers_over_a_shared_prefix_are_those_without(server: LocalServer, local_server: LocalServer) -> None:
    body: dict[str, object] = {"prompt": SYSTEM + "And now", "max_tokens": 12}
    shared = [post(server, key, body).json()["choices"][0]["text"] for key in KEYS]
    alone = post(local_server, "tenant-a", body).json()["choices"][0]["text"]
    assert shared == [alone, alone]

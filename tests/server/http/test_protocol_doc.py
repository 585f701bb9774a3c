"""docs/protocol.md says what the server does."""

import json
import re

import pytest

from macaw.errors import _BY_CODE
from macaw.protocol import ProgramRequest
from macaw_server.http import create_app
from server.http.conftest import sse
from server.service.harness import DOCS

TEXT = (DOCS / "protocol.md").read_text()
PROGRAM, HINTS = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))


async def test_the_program_runs(api):
    events = sse((await api.post("/v1/programs", PROGRAM)).text)
    assert events[-1][1] == "program.completed"
    assert set(events[-1][2]["variables"]) == {"final"}
    documented = set(re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", TEXT, re.MULTILINE))
    assert {name for _, name, _ in events} == documented - {"call.failed", "program.failed"}


async def test_the_hints_are_accepted(api):
    assert (await api.post("/v1/chat/completions", HINTS)).status_code == 200


def test_every_route_is_named(make_api):
    routes = {route.path.replace(":path}", "}") for route in create_app(make_api().service).routes}
    assert routes == {match for match in re.findall(r"`(?:GET|POST|PUT|DELETE) (/\S+)`", TEXT) if "?" not in match}


@pytest.mark.parametrize("code", _BY_CODE)
def test_every_code_is_named(code):
    status = _BY_CODE[code].default_status if code != "request_too_large" else 413
    assert f"| `{code}` | {status} |" in TEXT


def test_every_field_of_a_program_is_named():
    assert all(f"| `{name}` |" in TEXT for name in ProgramRequest.model_fields)

"""One rate on one side: when it is sustained, and that overload ends at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from macaw_server.bench.errors import BenchError, RefusedError
from macaw_server.bench.workload.clients import Way, WorkloadClient
from macaw_server.bench.workload.probe import Probe, Slo, fresh, probe
from macaw_server.bench.workload.records import Outcome
from macaw_server.bench.workload.sustain import SearchOptions, programs_at, sample
from macaw_server.bench.workload.texts import Texts
from macaw_server.config import EngineConfig
from macaw_server.models.loader import load_tokenizer
from macaw_server.workloads import WORKLOADS, CallSpec, ProgramSpec, Text, WorkloadOptions, make_workload

SLO = Slo(token_ms=1.0, share=0.9)
SEARCH = SearchOptions(Slo(100.0, 0.9), probe_s=10.0, min_programs=5)


class Scripted(WorkloadClient):
    """Programs end as `script` says by their number: after so many seconds, never (None), or with an error."""

    def __init__(self, script: Callable[[int], float | Exception | None]) -> None:
        self._script, self._texts, self.cancelled = script, {}, set[str]()  # type: ignore[assignment]

    async def _run_program(self, spec: ProgramSpec) -> Outcome:
        end = self._script(int(spec.id))
        try:
            if isinstance(end, Exception):
                raise end
            if end is None:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.add(spec.id)
            raise
        return Outcome(spec, first_token_s=end / 2, ended_s=end, prompt_tokens=4, cached_tokens=3)


def programs(num: int, app: str = "app", first: int = 0) -> list[ProgramSpec]:
    """Of ten output tokens each, so that they have 10 ms; all arrive at once."""
    calls = (CallSpec("a", (), 10),)
    return [ProgramSpec(str(i), app, 0.0, calls, ("a",)) for i in range(first, first + num)]


async def test_all_are_in_time() -> None:
    client = Scripted(lambda i: 0.002)
    assert await probe(client, programs(20), 3.0, SLO) == Probe(
        3.0, True, 20, 20, 0, 0, False, 0.2, 0.2, 0.001, 0.75, duration_s=pytest.approx(0.0, abs=60)
    )


async def test_late_answers_count_though_they_came() -> None:
    few = await probe(Scripted(lambda i: 0.02 if i < 2 else 0.001), programs(20), 3.0, SLO)
    assert (few.sustained, few.num_within, few.num_late) == (True, 18, 2)
    assert few.token_p90_ms == pytest.approx(0.1)
    many = await probe(Scripted(lambda i: 0.02 if i < 3 else 0.001), programs(20), 3.0, SLO)
    assert (many.sustained, many.num_within, many.num_late) == (False, 17, 3)


async def test_overload_ends_as_soon_as_too_many_are_late() -> None:
    client = Scripted(lambda i: None)
    late = [replace(spec, arrival_s=1e6) for spec in programs(10, first=10)]
    found = await probe(client, [*programs(10), *late], 3.0, SLO)
    assert not found.sustained
    assert found.cut_off
    assert found.num_within == 0
    assert 3 <= found.num_late <= 10  # of the others it is not known
    assert found.token_ms is not None
    assert found.token_ms >= 1.0  # late as they are
    assert client.cancelled == {str(i) for i in range(20)}


async def test_few_that_never_end_are_waited_for_a_while() -> None:
    client = Scripted(lambda i: None if i == 7 else 0.001)
    found = await probe(client, programs(10), 3.0, SLO)
    assert (found.sustained, found.cut_off, found.num_within, found.num_late) == (True, True, 9, 1)
    assert client.cancelled == {"7"}


async def test_each_app_has_its_own_share() -> None:
    both = [*programs(20), *programs(5, "rare", first=20)]
    found = await probe(Scripted(lambda i: 0.02 if i == 22 else 0.001), both, 3.0, SLO)
    assert (found.sustained, found.num_late) == (False, 1)


async def test_a_refused_program_is_late() -> None:
    found = await probe(Scripted(lambda i: RefusedError("full") if i < 5 else 0.001), programs(20), 3.0, SLO)
    assert (found.sustained, found.num_late, found.num_refused) == (False, 5, 5)


async def test_a_failure_is_no_result() -> None:
    with pytest.raises(BenchError, match="broken"):
        await probe(Scripted(lambda i: BenchError("broken") if i == 3 else None), programs(20), 3.0, SLO)


@asynccontextmanager
async def answering(status: str) -> AsyncIterator[str]:
    """A server that has one answer; yields its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error": {"message": "as told", "code": "x"}}'
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nretry-after: 0\r\nconnection: close\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("way", ["requests", "programs"])
@pytest.mark.parametrize(("status", "kind"), [("429 Too Many Requests", RefusedError), ("400 Bad Request", BenchError)])
async def test_what_the_server_says(way: Way, status: str, kind: type[BenchError]) -> None:
    calls = tuple(CallSpec(call_id, (Text(call_id, 3),), 2) for call_id in "ab")
    spec = ProgramSpec("p", "app", 0.0, calls, ("a", "b"))
    texts = Texts(load_tokenizer(EngineConfig()), 0)
    async with answering(status) as url, WorkloadClient(url, "m", None, way, texts) as client:
        with pytest.raises(BenchError, match="as told") as caught:
            await client.run([spec])
    assert type(caught.value) is kind


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_a_fresh_program_shares_what_programs_share(workload: str) -> None:
    made = list(make_workload(workload, WorkloadOptions(scale=0.1, num_programs=6)))

    def keys(specs: Sequence[ProgramSpec]) -> set[str]:
        return {part.key for spec in specs for call in spec.calls for part in call.parts if isinstance(part, Text)}

    one, other = [[fresh(spec, tag) for spec in made] for tag in ("0", "1")]
    of_one_program = {key for spec in made for key in keys([spec]) if not key.startswith(f"{spec.id}/")}
    assert keys(one) & keys(other) == of_one_program
    for before, after in zip(made, one, strict=True):
        assert after.prompt_lens() == before.prompt_lens()


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_a_higher_rate_is_the_same_programs_closer_together(workload: str) -> None:
    options = WorkloadOptions(scale=0.1)
    slow, fast = (programs_at(workload, options, SEARCH, rate, 0, "t") for rate in (0.5, 1.0))
    name = f"t/{WORKLOADS[workload][0].name}-"
    slow, fast = ([spec for spec in specs if spec.id.startswith(name)] for specs in (slow, fast))
    assert (len(slow), len(fast)) == (5, 10)
    for one, other in zip(slow, fast, strict=False):
        assert one == replace(other, arrival_s=one.arrival_s)
        assert one.arrival_s == pytest.approx(2 * other.arrival_s)


def test_other_streams_end_with_the_first() -> None:
    specs = programs_at("mixed", WorkloadOptions(scale=0.1), SEARCH, 1.0, 0, "t")
    assert specs[-1].app == "map-reduce"
    assert {spec.app for spec in specs} == {"map-reduce", "chat"}
    assert len([spec for spec in specs if spec.app == "map-reduce"]) == 10


def test_the_sample_has_every_app() -> None:
    chosen = sample("gpts", WorkloadOptions(), 3)
    assert {spec.app for spec in chosen} == {"gpts/productivity", "gpts/programming", "gpts/game", "gpts/art"}
    assert all(spec.arrival_s == 0 for spec in chosen)
    assert [spec.id for spec in chosen[:3]] == ["gpts-0", "gpts-1", "gpts-2"]

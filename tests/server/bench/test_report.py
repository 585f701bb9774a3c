"""What a run says: medians, spreads, ratios within a round, shares of the limit."""

from __future__ import annotations

import io
import json

from rich.console import Console

from macaw_server.bench.cases import Case
from macaw_server.bench.client import Answer, Burst
from macaw_server.bench.engine import Result
from macaw_server.bench.report import TABLE_WIDTH, Report, Spread

CASE = Case(2, True, True, prefix_len=90, own_len=10, output_len=4)


def burst(seconds: float, *, cached: int = 80) -> Burst:
    answers = [Answer(0.25, [0.125, 0.125, 0.5], seconds, cached), Answer(0.75, [0.125, 0.125, 0.25], 1.0, cached)]
    return Burst(8, answers)


def make_report() -> Report:
    bursts = {"macaw": [burst(1.0), burst(2.0), burst(4.0)], "peer": [burst(2.0), burst(8.0), burst(4.0, cached=50)]}
    return Report([Result(CASE, bursts)], {"shared-2-warm": 16.0}, {"machine": "a [fast] one"})


def test_summaries() -> None:
    macaw, peer = make_report().summaries
    assert (macaw.case, macaw.side, peer.side) == ("shared-2-warm", "macaw", "peer")
    assert macaw.tokens_per_s == Spread(4.0, 2.0, 8.0)
    assert macaw.ratio == Spread(2.0, 1.0, 4.0), "of the rounds, not of the medians"
    assert macaw.limit_share == 0.25
    assert (macaw.ttft_ms, macaw.itl_p50_ms, macaw.itl_p99_ms) == (500, 125, 500)
    assert (macaw.cached_share, peer.cached_share) == (0.8, 0.7)
    assert (peer.ratio, peer.limit_share) == (None, 0.125)


def test_a_limit_that_is_not_known_is_left_out() -> None:
    report = Report(make_report().results, {}, {})
    assert [summary.limit_share for summary in report.summaries] == [None, None]
    assert report.as_markdown().rstrip().endswith("|  |  |")


def test_what_is_written_has_everything() -> None:
    report = make_report()
    console = Console(width=TABLE_WIDTH, record=True, file=io.StringIO())
    report.print(console)
    for text in (console.export_text(), report.as_markdown()):
        for words in ("shared-2-warm", "4 (2 - 8)", "2.00x (1.00 - 4.00)", "80%", "25%", "a [fast] one"):
            assert words in text
    written = json.loads(report.as_json())
    assert written["facts"] == {"machine": "a [fast] one"}
    assert written["results"][0]["name"] == "shared-2-warm"
    assert written["results"][0]["bursts"]["peer"][1]["answers"][0]["seconds"] == 8.0
    assert written["summaries"][0]["ratio"] == {"median": 2.0, "low": 1.0, "high": 4.0}

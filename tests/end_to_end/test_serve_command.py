"""`macaw serve` as its user starts it: output, kill -9 of the engine, SIGTERM, errors at start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from macaw import MacawClient, MacawError, ProgramBuilder
from macaw.protocol import CallDelta, ProgramRequest

COMMAND = [sys.executable, "-m", "macaw_server", "serve"]
FLAGS = ["macaw-demo", "--port", "0", "--dtype", "float32", "--max-model-len", "2048", "--threads", "1"]


@contextmanager
def serving(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server process, its URL, and the lines it printed until it was ready."""
    process = subprocess.Popen([*COMMAND, *FLAGS, *flags], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving at (http://\S+)/v1", line):
                yield process, found[1], lines
                return
        pytest.fail("".join(lines))
    finally:
        process.kill()
        process.communicate()


def long_program(max_tokens: int = 400) -> ProgramRequest:
    b = ProgramBuilder()
    maps = [b.chat(f"Part {i}", temperature=0, max_tokens=max_tokens, ignore_eos=True) for i in range(3)]
    b.target(b.chat("Combine ", b.join(maps), name="end", temperature=0, max_tokens=20))
    return b.build()


def engine_of(server: subprocess.Popen[str]) -> psutil.Process:
    children = [c for c in psutil.Process(server.pid).children() if c.status() != psutil.STATUS_ZOMBIE]
    return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))


@pytest.mark.slow
def test_kill_9_of_the_engine_in_mid_program() -> None:
    with serving() as (process, url, _), MacawClient(url) as client:
        expected = client.run_program(long_program()).variables["end"]
        with client.stream_program(long_program()) as stream:
            deltas = (event for event in stream if isinstance(event, CallDelta))
            for _ in range(60):
                next(deltas)
            engine = engine_of(process)
            os.kill(engine.pid, signal.SIGKILL)
            assert stream.result()["end"] == expected
        assert engine_of(process).pid != engine.pid
        assert client.health()["status"] == "ok"


@pytest.mark.slow
def test_start_up_output_and_sigterm_lets_programs_end() -> None:
    with serving("--api-key", "k1", "--kv-memory", "64MiB") as (process, url, lines):
        text = "".join(lines)
        for words in (
            "macaw-demo",
            "float32 on cpu",
            "2,048 tokens",
            "pages of 16 tokens, 64 MiB",
            "summarises short notes",
            url,
        ):
            assert words in text, text
        with OpenAI(base_url=f"{url}/v1", api_key="k1") as api:
            messages = [{"role": "user", "content": "hello"}]
            whole = api.chat.completions.create(model="macaw-demo", messages=messages, max_tokens=8, temperature=0)
            parts = api.chat.completions.create(
                model="macaw-demo", messages=messages, max_tokens=8, temperature=0, stream=True
            )
            text = "".join(part.choices[0].delta.content or "" for part in parts)
            assert text == whole.choices[0].message.content
        with MacawClient(url, "k1") as client, client.stream_program(long_program(200)) as stream:
            assert stream.program_id
            engine = engine_of(process)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert "stopping: no new work" in process.stderr.readline()
            with pytest.raises(MacawError, match=r"shutting down|No Macaw server"):
                client.run_program(long_program(5))
            assert stream.result()["end"]
        assert process.wait(60) == 0
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_sigterm_cancels_what_does_not_end_in_time() -> None:
    with serving("--shutdown-timeout-s", "0.2") as (process, url, _), MacawClient(url) as client:
        with client.stream_program(long_program(1900)) as stream:
            assert stream.program_id
            process.send_signal(signal.SIGTERM)
            with pytest.raises(MacawError, match="shutting down") as error:
                stream.result()
            assert error.value.code == "cancelled"
        assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_loading_leaves_nothing_behind(number: signal.Signals) -> None:
    with subprocess.Popen([*COMMAND, *FLAGS], stderr=subprocess.PIPE, text=True, preexec_fn=_signals) as process:
        server = psutil.Process(process.pid)
        while not (engines := [c for c in server.children() if "spawn_main" in " ".join(c.cmdline())]):
            assert process.poll() is None
        process.send_signal(number)
        assert process.stderr is not None
        words = process.stderr.read()  # to its end: nobody holds it open
        assert process.wait() == -number
        assert ("stopped while loading" in words) == (number != signal.SIGKILL), words
        # Who is killed cannot finish what it is telling its child, and the child says so.
        assert "Traceback" not in words or number == signal.SIGKILL
        gone, alive = psutil.wait_procs(engines, timeout=60)
        assert gone
        assert not alive


def _signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


def run_cli(*flags: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1"}
    return subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["./nowhere"], "No folder ./nowhere"),
        (["org/model"], "the hub at http://127.0.0.1:1 cannot be reached"),
        (["macaw-demo", "--kv-memory", "1KiB"], "fewer than the context"),
        (["macaw-demo", "--kv-memory", "lots"], "--kv-memory='lots'"),
        (["macaw-demo", "--max-model-len", "9000"], "over the 8,192"),
        (["macaw-demo", "--device", "cuda:7"], "sees 0 GPUs"),
    ],
)
def test_what_is_wrong_at_start_is_said_in_words(flags: list[str], words: str) -> None:
    result = run_cli(*flags, "--port", "0")
    assert result.returncode != 0
    assert words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from tiny_models import tokenizer

    BloomForCausalLM(BloomConfig(vocab_size=600, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    result = run_cli(str(tmp_path), "--port", "0")
    assert result.returncode == 1
    assert "0 of its 2 layers go through the replaceable attention" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_port_in_use_is_said_before_the_model_loads() -> None:
    with serving() as (_, url, _):
        result = run_cli("macaw-demo", "--port", url.rsplit(":", 1)[1])
        assert result.returncode == 1
        assert "is in use" in result.stderr
        assert "random weights" not in result.stderr

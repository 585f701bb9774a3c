"""The plain-Python front end against a real server: published programs, exactness, prefix sharing, ends."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import macaw
from conftest import TENANTS
from macaw import MacawClient, ProgramBuilder
from macaw import parrot as P
from macaw.functions.session import Session
from macaw_server.serve import LocalServer

GREEDY = macaw.Sampling(temperature=0, max_tokens=12)
SHORT = P.SamplingConfig(temperature=0.0, max_gen_length=8)


@macaw.function(**GREEDY)
def write_code(task):
    """You are an engineer. Write Python code for {{input:task}}. {{output:code}}"""


@macaw.function(**GREEDY)
def write_tests(task, code):
    """You are a tester. Write tests for {{input:task}}.
    Code: {{input:code}}
    {{output:test}}"""


@macaw.function(**GREEDY)
def tell(topic):
    """Tell a joke about {{input:topic}}. {{output:joke}} Now explain why it is funny. {{output:explanation}}"""


@macaw.function(temperature=0, max_tokens=1500, ignore_eos=True)
def ramble(topic):
    """Talk about {{input:topic}}. {{output:talk}}"""


@pytest.fixture
def session(local_server: LocalServer) -> Iterator[Session]:
    with macaw.session(local_server.url, api_key=TENANTS[0]) as session:
        yield session


@pytest.fixture
def requests_sent(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Method and path of every request since the last look, as httpx logs them."""
    caplog.set_level(logging.INFO, logger="httpx")

    def look() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "httpx"]
        caplog.clear()
        return [f"{line.split()[2]} {httpx.URL(line.split()[3]).path}" for line in lines]

    return look


def chat(client: MacawClient, *messages: tuple[str, str]) -> str:
    b = ProgramBuilder()
    b.target(b.call([{"role": role, "content": text} for role, text in messages], name="answer", **GREEDY))
    return client.run_program(b.build()).variables["answer"]


def test_snake_game_is_one_program_and_both_come(
    session: Session, client: MacawClient, requests_sent: Callable[[], list[str]]
) -> None:
    task = macaw.variable("task", value="a snake game")
    code = write_code(task)
    test = write_tests(task, code)
    answers = code.get(objective="latency"), test.get(objective="latency")
    assert requests_sent() == ["POST /v1/programs"]
    first = "You are an engineer. Write Python code for a snake game."
    assert answers[0] == chat(client, ("user", first))
    second = f"You are a tester. Write tests for a snake game.\nCode: {answers[0]}"
    assert answers[1] == chat(client, ("user", second))
    state = session.program.trace().state
    assert {target.objective for target in state.targets} == {"latency"}
    assert [call.id for call in state.calls] == ["write_code.code", "write_tests.test"]


def test_snake_game_of_the_paper_with_only_the_import_changed(local_server: LocalServer) -> None:
    @P.SemanticFunction
    def WritePythonCode(task: P.SemanticVariable):  # noqa: N802
        """You write software.
        Write python code of {{input:task}}.
        Code: {{output:code}}
        """

    @P.SemanticFunction
    def WriteTestCode(task: P.SemanticVariable, code: P.SemanticVariable):  # noqa: N802
        """You test software.
        You write test code for {{input:task}}.
        Code: {{input:code}}.
        Your test code: {{output:test}}
        """

    def WriteSnakeGame():  # noqa: N802
        task = P.SemanticVariable("a snake game")
        code = WritePythonCode(task)
        test = WriteTestCode(task, code)
        return code.get(perf=P.LATENCY), test.get(perf=P.LATENCY)

    with macaw.session(local_server.url, api_key=TENANTS[0]) as session:
        code, test = WriteSnakeGame()
        assert code
        assert test
        write, check = session.program.trace().state.calls
        assert write.completion is not None
        assert write.completion["object"] == "text_completion"
        assert check.inputs == ["variable", "WritePythonCode.code"]


def test_parrots_multi_agent_program(local_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of Parrot's snake_game_dev example: its names and calls, with shorter prompts."""
    monkeypatch.setenv("MACAW_API_KEY", TENANTS[0])
    vm = P.VirtualMachine(core_http_addr=local_server.url, mode="release")

    @P.semantic_function(formatter=P.allowing_newline)
    def architect(main_api: P.Output(SHORT), game_api: P.Output(SHORT), snake_api: P.Output(SHORT)):  # type: ignore[valid-type]
        """Plan a snake game.
        main.py: {{main_api}}
        game.py: {{game_api}}
        snake.py: {{snake_api}}
        """

    @P.semantic_function(formatter=P.allowing_newline)
    def programmer(plan: P.Input, file_name: str, code: P.Output(SHORT)):  # type: ignore[valid-type]
        """Plan: {{plan}}
        Write {{file_name}}: {{code}}"""

    @P.semantic_function(formatter=P.allowing_newline)
    def reviewer(main_code: P.Input, snake_code: P.Input, game_code: P.Input, review: P.Output(SHORT)):  # type: ignore[valid-type]
        """{{main_code}} {{snake_code}} {{game_code}}
        Comments: {{review}}"""

    @P.native_function()
    def label(review: P.Input, labelled: P.Output):
        labelled.set("Review: " + review)

    results = []

    def main():
        main_api, game_api, snake_api = architect()
        code_main = programmer(main_api, "main.py")
        code_snake = programmer(snake_api, "snake.py")
        code_game = programmer(game_api, "game.py")
        review = label(reviewer(code_main, code_snake, code_game))
        results.extend([code_main.get(), review.get()])

    assert vm.run(main, timeit=False) > 0
    assert results[0]
    assert results[1].startswith("Review: ")


@pytest.mark.parametrize("chat_prompt", [True, False])
def test_second_output_goes_on_with_the_first_ones_text_and_pages(
    session: Session, client: MacawClient, chat_prompt: bool
) -> None:
    topic = "macaws, parrots and other birds, at some length, " * 12
    function = tell if chat_prompt else macaw.function(chat=False, **GREEDY)(tell.__wrapped__)
    joke, explanation = function(topic)
    why = explanation.get()
    if chat_prompt:
        begin = [("user", f"Tell a joke about {topic}."), ("assistant", joke.get())]
        assert why == chat(client, *begin, ("user", "Now explain why it is funny."))
    else:
        b = ProgramBuilder()
        text = f"Tell a joke about {topic}. {joke.get()} Now explain why it is funny. "
        b.target(b.complete(text, name="why", **GREEDY))
        assert why == client.run_program(b.build()).variables["why"]
    first, second = session.program.trace().state.calls
    usage = [call.completion["usage"] for call in (first, second) if call.completion]
    cached = usage[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 0.9 * usage[0]["prompt_tokens"], "the second call finds the first one's prompt"


def test_program_grows_as_more_is_built(session: Session, requests_sent: Callable[[], list[str]]) -> None:
    code = write_code("one")
    first = code.get()
    better = write_code(code)
    assert better.get() != first
    shout = macaw.native_function(str.upper)
    loud = write_code(shout(better))
    assert "".join(loud.stream()) == loud.get()
    program = session.program.id
    sent = requests_sent()
    assert sent[:3] == ["POST /v1/programs", *[f"POST /v1/programs/{program}/calls"] * 2]
    assert set(sent[3:]) <= {f"PUT /v1/programs/{program}/variables/upper.result"}
    assert "write_code.code-3" in str(session.program.trace())
    assert "write_code.code-3" in session.program.trace()._repr_svg_()


def test_async_session(local_server: LocalServer, requests_sent: Callable[[], list[str]]) -> None:
    @macaw.native_function
    async def count(code: str) -> int:
        assert asyncio.get_running_loop() is loop
        return len(code)

    async def main() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        async with macaw.session(local_server.url, api_key=TENANTS[0]) as session:
            code = write_code("a snake game")
            size = count(code)
            test = write_tests(size, code)
            pieces = [piece async for piece in code]
            assert "".join(pieces) == await code
            assert len(pieces) > 1
            assert await asyncio.gather(size, test) == [str(len(await code)), await test]
            assert len((await session.program.atrace()).state.calls) == 2

    loop: asyncio.AbstractEventLoop | None = None
    asyncio.run(main())
    assert requests_sent()[0] == "POST /v1/programs"


def test_program_of_a_session_that_was_left_is_completed(local_server: LocalServer, client: MacawClient) -> None:
    with macaw.session(local_server.url, api_key=TENANTS[0]) as session:
        write_code("x").get()
    program = session.program.id
    assert program is not None
    assert client.get_program(program).status == "completed"
    assert str(session.program.trace())


@pytest.mark.parametrize("by_exception", [False, True])
def test_leaving_cancels_what_runs(
    local_server: LocalServer, client: MacawClient, pages_in_use: Callable[[], float], by_exception: bool
) -> None:
    def use() -> None:
        with macaw.session(local_server.url, api_key=TENANTS[0]) as session:
            talk = ramble("birds")
            next(talk.stream())
            programs.append(session.program.id)
            if by_exception:
                raise KeyError("mine")

    programs: list[str | None] = []
    if by_exception:
        with pytest.raises(KeyError, match="mine"):
            use()
    else:
        use()
    assert programs[0] is not None
    state = client.get_program(programs[0])
    assert state.error is not None
    assert state.error.code == "cancelled"
    assert pages_in_use() == 0


def test_deadline(session: Session) -> None:
    with pytest.raises(macaw.DeadlineExceededError, match=r"ramble\(\): output 'talk' failed\. The deadline of"):
        ramble("birds").get(deadline_ms=50)
    assert write_code("x").get(), "in a new program"


def test_error_points_at_function_and_output_and_others_go_on(session: Session) -> None:
    long = macaw.variable("long")
    wrong, right = write_code(long), write_code("x")
    after = write_tests("x", wrong)
    long.set("x " * 4000)
    with pytest.raises(macaw.ContextLengthError, match=r"write_code\(\): output 'code' failed\. Prompt of"):
        wrong.get()
    with pytest.raises(macaw.UpstreamFailedError, match=r"write_tests\(\): output 'test'.*write_code\(\).*context"):
        after.get()
    assert right.get()
    with pytest.raises(macaw.ContextLengthError, match=r"write_code\(\): output 'code' failed\. Prompt of"):
        write_code("x " * 4000).get()


def test_threads_share_a_session_or_have_their_own(local_server: LocalServer, session: Session) -> None:
    def own(i: int) -> str:
        with macaw.session(local_server.url, api_key=TENANTS[i % 2]) as mine:
            assert macaw.current_session() is mine
            return write_code("x").get()

    codes = [write_code(f"task {i % 2}") for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        shared = list(pool.map(lambda code: code.get(), codes))
        assert len(set(shared)) == 2
        assert set(pool.map(own, range(6))) == {write_code("x").get()}
    assert not [thread for thread in threading.enumerate() if thread.name == "macaw-session"][1:]


def test_default_session(
    local_server: LocalServer, monkeypatch: pytest.MonkeyPatch, requests_sent: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("MACAW_BASE_URL", local_server.url)
    monkeypatch.setenv("MACAW_API_KEY", TENANTS[1])
    monkeypatch.setenv("MACAW_MODEL", "macaw-demo")
    macaw.current_session().close()  # of an earlier test
    default = macaw.current_session()
    try:
        code = write_code("x")
        assert asyncio.run(code.aget()) == code.get()
        assert requests_sent() == ["POST /v1/programs"]
    finally:
        default.close()


GUIDE = Path(__file__).parents[2] / "docs" / "functions.md"


def test_every_snippet_of_the_guide_runs(local_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACAW_BASE_URL", local_server.url)
    monkeypatch.setenv("MACAW_API_KEY", TENANTS[0])
    text = (
        GUIDE.read_text().replace("http://127.0.0.1:8000", local_server.url).replace("max_tokens=400", "max_tokens=9")
    )
    printed: list[str] = []
    names = {"print": lambda *values, end="\n": printed.append(f"{' '.join(map(str, values))}{end}")}
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) >= 5
    for number, snippet in enumerate(snippets):
        source = snippet.replace("temperature=0.2", "max_tokens=9, temperature=0.2")
        exec(compile(source, f"{GUIDE.name}[{number}]", "exec"), names)
    assert "graph LR" in "".join(printed)
    assert "critical path" in printed[-1]

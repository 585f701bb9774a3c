"""A LangGraph agent with tools and a `Send` fan-out, unchanged, on a real server: one program with groups there."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest
from capable_model import MODEL, get_the_weather
from langchain.agents import create_agent
from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from langchain_macaw import ChatMacaw
from langchain_macaw.hints import follower
from macaw import MacawClient
from macaw_server.serve import LocalServer

pytestmark = pytest.mark.slow

QUESTION = "What is the weather in San Francisco, CA?"
TOPICS = ("Hello", "Hey", "hi")
ANSWER = "It is sunny in San Francisco."


class State(TypedDict, total=False):
    question: str
    weather: str
    topic: str
    lines: Annotated[list[str], operator.add]
    page: str


def weather_page(llm: ChatMacaw) -> Any:
    """An agent asks its tool; three writers work side by side; an editor ends it."""
    agent = create_agent(llm, [get_the_weather])

    def ask(state: State) -> State:
        answer = agent.invoke({"messages": [("user", state["question"])]})
        return {"weather": answer["messages"][-1].content}

    async def aask(state: State) -> State:
        answer = await agent.ainvoke({"messages": [("user", state["question"])]})
        return {"weather": answer["messages"][-1].content}

    builder = StateGraph(State)
    builder.add_node("ask", RunnableLambda(ask, aask))
    builder.add_node("write", RunnableLambda(lambda s: {"lines": [llm.invoke(s["topic"]).content]}))
    builder.add_node("edit", lambda s: {"page": llm.invoke("hi").content})
    builder.add_edge(START, "ask")
    builder.add_conditional_edges(
        "ask", lambda s: [Send("write", {"topic": t}) for t in ("Hello", "Hey", "hi")], ["write"]
    )
    builder.add_edge("write", "edit")
    builder.add_edge("edit", END)
    return builder.compile()


@pytest.fixture
def client(capable_server: LocalServer) -> Iterator[MacawClient]:
    with MacawClient(capable_server.url) as client:
        yield client


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "astream_events"])
async def test_its_calls_are_one_program_with_groups(
    capable_server: LocalServer, client: MacawClient, way: str
) -> None:
    llm = ChatMacaw(model=MODEL, base_url=f"{capable_server.url}/v1", temperature=0, max_tokens=60)
    graph, known = weather_page(llm), {state.id for state in client.list_programs()}
    match way:
        case "invoke":
            result = graph.invoke({"question": QUESTION})
        case "ainvoke":
            result = await graph.ainvoke({"question": QUESTION})
        case _:
            events = [event async for event in graph.astream_events({"question": QUESTION}, version="v2")]
            result = events[-1]["data"]["output"]
    assert result["weather"] == ANSWER
    assert len(result["lines"]) == 3

    (state,) = [state for state in client.list_programs() if state.id not in known]
    assert state.status == "completed"
    assert state.totals.calls == len(state.calls) == 6
    *agent, first, second, third, editor = sorted(state.calls, key=lambda call: call.depth)
    assert [call.depth for call in agent] == [0, 1], "the question; then its tool's answer"
    assert [call.depth for call in (first, second, third)] == [2, 2, 2]
    assert editor.depth == 3
    assert first.group is not None
    assert first.group == second.group == third.group
    assert {call.group for call in (*agent, editor)} == {None}
    assert len(follower()) == 0

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from macaw.protocol import Call
from macaw_server.engine.types import Reuse
from macaw_server.programs.leads import Atom, Lead, Leads, answer_atoms, prompt_atoms
from macaw_server.programs.program import STEPS_TO_UNKNOWN
from server.programs.builders import program, take


def completion(call_id: str, *parts: str) -> Call:
    """A text completion; a part that starts with ``$`` is a variable."""
    prompt = [
        {"type": "variable", "variable": part[1:]} if part.startswith("$") else {"type": "text", "text": part}
        for part in parts
    ]
    return Call.model_validate({"id": call_id, "output": f"{call_id}.out", "request": {"prompt": prompt}})


def chat(call_id: str, *messages: tuple[str, str]) -> Call:
    content = [
        {"role": role, "content": [{"type": "variable", "variable": text[1:]}] if text.startswith("$") else text}
        for role, text in messages
    ]
    return Call.model_validate({"id": call_id, "output": f"{call_id}.out", "request": {"messages": content}})


class TestLeads:
    def test_the_longest_common_beginning_and_a_shorter_one_that_is_needed_sooner(self) -> None:
        leads = Leads()
        leads.add(completion("far", "rules", "doc", "$x"), 3)
        leads.add(completion("near", "rules", "other"), 1)
        leads.add(completion("else", "unlike"), 1)
        assert leads.of(completion("now", "rules", "doc", "question"), 0) == [Lead(2, 3), Lead(1, 1)]
        leads.remove("far")
        assert leads.of(completion("now", "rules", "doc", "question"), 0) == [Lead(1, 1)]
        leads.remove("near")
        leads.remove("near")
        assert leads.of(completion("now", "rules", "doc", "question"), 0) == []

    def test_a_prompt_that_quotes_the_answer_goes_on_from_all_of_it(self) -> None:
        leads = Leads()
        ask = chat("ask", ("system", "Be brief."), ("user", "Why?"))
        leads.add(
            chat("more", ("system", "Be brief."), ("user", "Why?"), ("assistant", "$ask.out"), ("user", "So?")), 1
        )
        assert leads.of(ask, 0) == [Lead(len(prompt_atoms(ask)) + len(answer_atoms(ask)), 1)]

    def test_another_role_is_another_beginning(self) -> None:
        leads = Leads()
        leads.add(chat("a", ("user", "Text.")), 1)
        assert leads.of(chat("b", ("system", "Text.")), 0) == []

    @given(st.lists(st.tuples(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), st.integers(0, 3)), max_size=8))
    def test_it_finds_what_a_search_finds(self, prompts: list[tuple[list[str], int]]) -> None:
        leads, calls = Leads(), [completion(f"c{i}", *parts) for i, (parts, _) in enumerate(prompts)]
        for call, (_, depth) in zip(calls, prompts, strict=True):
            leads.add(call, depth)
        for i, (parts, depth) in enumerate(prompts):
            leads.remove(calls[i].id)
            expected: dict[int, int] = {}  # by length, the steps until the next call that has so much in common
            for other, other_depth in prompts[i + 1 :]:
                for num in range(1, len(parts) + 1):
                    if other[:num] == parts[:num]:
                        expected[num] = min(expected.get(num, 99), max(1, other_depth - depth))
            kept = [
                Lead(num, steps)
                for num, steps in sorted(expected.items(), reverse=True)
                if all(longer <= num or expected[longer] > steps for longer in expected)
            ]
            assert leads.of(calls[i], depth) == kept
        assert leads._root.next == {}


class TestReuse:
    def length(self, atom: Atom) -> int:
        return len(atom.value)

    def test_of_calls_to_come_and_no_more(self) -> None:
        steps = [
            completion("a", "rules " * 10, "first"),
            completion("b", "rules " * 10, "second", "$a.out"),
            completion("c", "rules " * 10, "second", "$a.out", "$b.out"),
        ]
        run = program(*steps, target="c.out")
        assert take(run) == ["a"]
        a, b = run.calls["a"], run.calls["b"]
        assert run.reuse(a, 650, self.length) == (Reuse(600, 1),)
        run.call_completed("a", {"usage": {"completion_tokens": 1}}, "x", 1.0)
        assert take(run) == ["b"]
        assert run.reuse(b, 72, self.length) == (Reuse(None, 1),)
        run.call_completed("b", {"usage": {"completion_tokens": 1}}, "x", 2.0)
        assert take(run) == ["c"]
        assert run.reuse(run.calls["c"], 80, self.length) == ()

    def test_of_a_branch_that_failed_nothing(self) -> None:
        run = program(
            completion("a", "rules", "x"),
            completion("b", "else", "y"),
            completion("c", "rules", "$b.out"),
            target="a.out",
            open=True,
        )
        take(run)
        a = run.calls["a"]
        open_end = Reuse(None, STEPS_TO_UNKNOWN)
        assert run.reuse(a, 6, self.length) == (Reuse(5, 1), open_end)
        run.call_failed("b", _error(), 1.0)
        assert run.reuse(a, 6, self.length) == (open_end,)

    def test_a_plain_request_may_be_gone_on_from_and_a_program_says_so(self) -> None:
        run = program(completion("a", "text"), target="a.out")
        take(run)
        assert run.hints(run.calls["a"], started_s=0.0, tenant="").may_return is False
        assert run.reuse(run.calls["a"], 4, self.length) == ()


def _error():  # type: ignore[no-untyped-def]
    from macaw.errors import InternalServerError

    return InternalServerError("broken")

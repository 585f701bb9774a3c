"""What is known of a prompt before all of it is: prefixes of values through transforms, and their tokens."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macaw.protocol import ChatCompletionRequest, CompletionRequest, ProgramGrowth, Variable
from macaw_server.programs.ahead import SENTINEL, KnownPrompt, known_prompt, stable_tokens
from macaw_server.programs.rendering import render
from server.programs.builders import (
    byte_level_tokenizer,
    call,
    complete,
    program,
    sentencepiece_style_tokenizer,
    take,
    transform,
)

TEMPLATE = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}[assistant]\n"
TOKENIZERS = {"byte-level": byte_level_tokenizer(), "sentencepiece": sentencepiece_style_tokenizer()}
for one in TOKENIZERS.values():
    one.chat_template = TEMPLATE
WORDS = ["The", "macaw", "is", "a", "parrot", "naïve", "🦜🦜", "clay.", "new lines;", "of\n\nthe", "  south", "\ttabs"]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def known(running, call_id, **answers):
    """What is known of a call's inputs, and what its prompt waits for."""
    return running.known_inputs(running.calls[call_id], lambda id_: answers.get(id_, ""))


class TestInputs:
    def test_values_and_the_answer_so_far(self):
        running = program(
            call("a"), call("b", "v", "a.out", "late"), target="b.out",
            variables={"v": Variable(value="known"), "late": Variable(external=True)},
        )  # fmt: skip
        take(running)
        inputs, source = known(running, "b", a="so far")
        assert inputs == {"v": "known", "a.out": "so far" + SENTINEL, "late": SENTINEL}
        assert source == "a"

    @pytest.mark.parametrize("op", ["strip", "html_escape"])
    @given(value=st.text("a <&\n"), cut=st.integers(0, 20))
    def test_prefixes_stay_prefixes(self, op, value, cut):
        running = program(call("a"), transform("t", op, "a.out"), call("b", "t.out"), target="b.out")
        inputs, source = known(running, "b", a=value[:cut])
        prefix = inputs["t.out"].removesuffix(SENTINEL)
        final = value.strip() if op == "strip" else html.escape(value)
        assert final.startswith(prefix)
        assert source == "a"

    @given(
        values=st.lists(st.text("x \n", max_size=4), min_size=1, max_size=4),
        at=st.integers(0, 3),
        cut=st.integers(0, 4),
        strip=st.booleans(),
        drop_blank=st.booleans(),
    )
    def test_joins_go_on_where_the_first_open_input_is(self, values, at, cut, strip, drop_blank):
        ids = [f"c{i}" for i in range(len(values))]
        join = transform(
            "t", "join", *(f"{id_}.out" for id_ in ids), separator="; ", strip=strip, drop_blank=drop_blank
        )
        running = program(*map(call, ids), join, call("b", "t.out"), target="b.out")
        take(running)
        at = min(at, len(values) - 1)
        for id_, value in zip(ids[:at], values, strict=False):
            running.call_completed(id_, {"usage": {"completion_tokens": 1}}, value, 0.0)
        inputs, source = known(running, "b", **{ids[at]: values[at][:cut]})
        assert source == ids[at]
        kept = [value for value in values if value.strip() or not drop_blank]
        final = "; ".join(value.strip() if strip else value for value in kept)
        assert final.startswith(inputs["t.out"].removesuffix(SENTINEL))

    def test_nothing_is_known_behind_other_transforms(self):
        running = program(call("a"), transform("t", "lines", "a.out"), call("b", "t.out"), target="b.out")
        assert known(running, "b", a="so far") == ({"t.out": SENTINEL}, None)


class TestNextCalls:
    def names(self, running, producers=None):
        return [node.call.id for node in running.next_calls(producers)]

    def test_those_that_wait_for_nothing_but_what_is_being_made(self):
        running = program(call("a"), call("b", "a.out"), call("c", "b.out"), target="c.out")
        assert self.names(running) == ["b"]
        assert take(running) == ["a"]
        assert self.names(running, ["a"]) == ["b"]
        complete(running, "a")
        assert take(running) == ["b"]
        assert self.names(running, ["b"]) == ["c"]

    def test_also_through_transforms_and_after_growth(self):
        running = program(call("a"), transform("t", "strip", "a.out"), open=True)
        take(running)
        running.grow(ProgramGrowth(calls=[call("b", "t.out"), call("c", "a.out", "b.out")]), 0.0)
        assert self.names(running, ["a"]) == self.names(running) == ["b"]

    def test_those_that_wait_for_the_client(self):
        running = program(call("a", "v"), target="a.out", variables={"v": Variable(external=True)})
        assert self.names(running) == ["a"]


def chat(*parts):
    content = [{"type": "variable", "variable": p[1:]} if p[0] == "$" else {"type": "text", "text": p} for p in parts]
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": content}]})


class TestByteLevelTokens:
    """Of a tokenizer whose tokens end with words."""

    @given(before=texts, value=texts, cuts=st.lists(st.integers(0, 80), max_size=4).map(sorted), after=texts)
    def test_natural_text_is_guessed_right_and_the_way_does_not_matter(self, before, value, cuts, after):
        tokenizer = TOKENIZERS["byte-level"]
        request = chat(f"{before} ", "$v", f" {after}.")
        whole = render(request, {"v": value}, tokenizer).token_ids
        last = None
        for cut in cuts:
            last = known_prompt(request, {"v": value[:cut] + SENTINEL}, tokenizer, last, 1000)
            fresh = known_prompt(request, {"v": value[:cut] + SENTINEL}, tokenizer, None, 1000)
            assert last == fresh
            tokens = stable_tokens(last, 1, 1000)
            assert whole[: len(tokens)] == tokens

    def test_tools_are_part_of_what_is_known(self):
        tokenizer = TOKENIZERS["byte-level"]
        function = {"name": "weather", "arguments": "{}"}
        answer = {"role": "tool", "tool_call_id": "c", "content": [{"type": "variable", "variable": "v"}]}
        request = ChatCompletionRequest.model_validate(
            {
                "messages": [
                    {"role": "user", "content": "Go."},
                    {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
                    answer,
                ],
                "tools": [{"type": "function", "function": {"name": "weather"}}],
            }
        )
        value = "The macaw is a parrot of the forests."
        whole = render(request, {"v": value}, tokenizer)
        for known, last in [("", "<tool_response>"), (value[:20], "The macaw is a")]:
            prompt = known_prompt(request, {"v": known + SENTINEL}, tokenizer, None, 1000)
            assert prompt.text.endswith(last)
            tokens = stable_tokens(prompt, 1, 1000)
            assert len(tokens) > 50
            assert whole.token_ids[: len(tokens)] == tokens

    def test_the_end_of_a_known_text_is_all_that_is_tokenised_again(self, monkeypatch):
        tokenizer, seen = TOKENIZERS["byte-level"], []
        request, value = chat("Go on: ", "$v"), "The macaw is a parrot of the forests. " * 40
        encode = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", lambda text, **kw: seen.append(len(text)) or encode(text, **kw))
        last = None
        for cut in range(0, len(value), 100):
            last = known_prompt(request, {"v": value[:cut] + SENTINEL}, tokenizer, last, 1000)
        assert last == known_prompt(request, {"v": value[:cut] + SENTINEL}, tokenizer, None, 1000)
        assert sum(seen[:-1]) < 3 * len(value)


@pytest.mark.parametrize("name", TOKENIZERS)
class TestTokens:
    @given(before=texts, value=texts, cuts=st.lists(st.integers(0, 80), max_size=4).map(sorted))
    def test_tokens_over_the_edges_of_words_make_wrong_guesses_and_nothing_worse(self, name, before, value, cuts):
        last = None
        for cut in cuts:
            last = known_prompt(chat(f"{before} ", "$v"), {"v": value[:cut] + SENTINEL}, TOKENIZERS[name], last, 1000)
            assert TOKENIZERS[name].decode(last.token_ids).lstrip() == last.text

    def test_full_pages_within_the_context(self, name):
        whole = KnownPrompt("", list(range(50)))
        assert len(stable_tokens(whole, 16, 1000)) == 48
        assert len(stable_tokens(whole, 16, 47)) == 32
        assert stable_tokens(KnownPrompt("", [1]), 16, 1000) == []

    def test_what_no_context_holds_is_not_tokenised(self, name):
        text = chat("word " * 1000, "$v")
        assert known_prompt(text, {"v": SENTINEL}, TOKENIZERS[name], None, 100) == ("", [])

    def test_text_completions_have_their_special_tokens(self, name):
        request = CompletionRequest.model_validate(
            {"prompt": [{"type": "text", "text": "The macaw is"}, {"type": "variable", "variable": "v"}]}
        )
        found = known_prompt(request, {"v": " a" + SENTINEL}, TOKENIZERS[name], None, 100)
        assert found.text == "The macaw is"
        assert found.token_ids == TOKENIZERS[name].encode("The macaw is")

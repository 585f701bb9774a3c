"""Constrained decoding in the engine: output matches its grammar, whatever else is asked and goes on beside it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.grammar import GrammarError, GrammarState, Vocabulary, compile_grammar
from macaw_server.engine.types import EngineOutput, EngineRequest, SamplingParams
from macaw_server.scheduler import Proposer
from tiny_models import VOCAB_SIZE, save_model, tokenizer

EOS = 2
PROMPT = tokenizer().encode("The parrot says ")
REGEX = LLMatcher.grammar_from_regex
SCHEMA = LLMatcher.grammar_from_json_schema
LARK = LLMatcher.grammar_from_lark


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(folder, "llama")
    return str(folder)


@pytest.fixture(scope="module")
def core(folder: str) -> EngineCore:
    return make_core(folder)


def make_core(folder: str, **config: Any) -> EngineCore:
    return EngineCore(EngineConfig(model=folder, dtype="float32", **config))


class Foresight:
    """Proposes known answers, by request id, with wrong tokens in them."""

    def __init__(self) -> None:
        self.answers: dict[str, list[int]] = {}

    def proposer(self, request: EngineRequest) -> Proposer:
        known, rng = request.prompt_ids + self.answers[request.request_id], random.Random(len(self.answers))

        class HalfRight:
            def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
                right = [*known, EOS][len(token_ids) : len(token_ids) + limit]
                return [token if rng.random() < 0.8 else rng.randrange(VOCAB_SIZE) for token in right]

        return HalfRight()


class Pair:
    """An engine and one that speculates: what they answer must be the same."""

    def __init__(self, core: EngineCore, folder: str) -> None:
        foresight = Foresight()
        config = EngineConfig(model=folder, dtype="float32", speculative_tokens=5, speculative_ridge=1e6)
        self.plain, self.speculating = core, EngineCore(config, make_proposer=foresight.proposer)
        self._answers = foresight.answers

    def finish(self, *requests: EngineRequest) -> dict[str, list[EngineOutput]]:
        plain = finish(self.plain, *requests)
        self._answers |= {name: tokens(outputs) for name, outputs in plain.items()}
        for name, outputs in finish(self.speculating, *requests).items():
            assert tokens(outputs) == tokens(plain[name])
            assert outputs[-1].finish_reason == plain[name][-1].finish_reason
        return plain


@pytest.fixture(scope="module")
def pair(core: EngineCore, folder: str) -> Iterator[Pair]:
    pair = Pair(core, folder)
    yield pair
    stats = pair.speculating.stats()
    assert 0 < stats.accepted_tokens <= stats.draft_tokens


def params(grammar: str | None, **fields: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"max_tokens": 100, "temperature": 2.0, "stop_token_ids": frozenset({EOS})}
    return SamplingParams(grammar=grammar, **defaults | fields)


def finish(core: EngineCore, *requests: EngineRequest) -> dict[str, list[EngineOutput]]:
    """All outputs of these requests, by id."""
    outputs: dict[str, list[EngineOutput]] = {}
    for request in requests:
        if (refused := core.add(request)) is not None:
            outputs[request.request_id] = [refused]
    while core.has_work:
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert core.stats().pages_used == 0
    return outputs


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(outputs: list[EngineOutput]) -> str:
    """The text of an answer; a stop token has none."""
    assert outputs[-1].error is None, outputs[-1].error
    ids = tokens(outputs)
    return tokenizer().decode(ids[:-1] if ids[-1:] == [EOS] else ids)


def answer(core: EngineCore, sampling: SamplingParams, prompt: Sequence[int] = PROMPT) -> tuple[str, str | None]:
    """Text and finish reason of one request."""
    outputs = finish(core, EngineRequest("one", list(prompt), sampling))["one"]
    return text(outputs), outputs[-1].finish_reason


# ------------------------------------------------------------------------------------------------------------
# JSON schemas

NAMES = st.sampled_from(["a", "bc", "name", "x y", 'q"', "é", "n\\n"])
SCALARS = st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab"\\/é\n🦜 ', max_size=5)


def bounds(low: st.SearchStrategy[Any], lower: str, upper: str) -> st.SearchStrategy[dict[str, Any]]:
    pair = st.tuples(low, low).map(sorted)
    return pair.flatmap(lambda p: st.sampled_from([{lower: p[0], upper: p[1]}, {upper: p[1]}, {lower: p[0]}]))


def with_type(name: str, *options: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.sampled_from([name, [name, "null"]]), *options).map(
        lambda parts: {"type": parts[0]} | {k: v for part in parts[1:] for k, v in part.items()}
    )


STRINGS = with_type(
    "string",
    st.tuples(st.integers(0, 3), st.integers(0, 9)).map(lambda p: {"minLength": p[0], "maxLength": p[0] + p[1]}),
) | st.sampled_from(
    [
        {"type": "string", "pattern": "^[a-f]{2,5}(-[0-9]+)?$", "maxLength": 12},
        {"type": "string", "pattern": "b+", "maxLength": 8},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "uuid"},
    ]
)
LEAVES = (
    STRINGS
    | with_type("integer", bounds(st.integers(-1000, 1000), "minimum", "maximum"))
    | with_type("number", bounds(st.integers(-1000, 1000).map(lambda n: n / 8), "minimum", "maximum"))
    | st.just({"type": "boolean"})
    | st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values})
    | SCALARS.map(lambda value: {"const": value})
    | st.just({"$ref": "#/$defs/tree"})
)


def objects(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], required: set[str], additional: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(required & properties.keys()),
            "additionalProperties": additional,
        }

    return st.builds(
        build, st.dictionaries(NAMES, children, max_size=4), st.sets(NAMES), st.just(False) | st.just({"type": "null"})
    )


def arrays(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        children,
        st.integers(0, 2),
        st.integers(0, 3),
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda children: (
        objects(children)
        | arrays(children)
        | st.lists(children, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    ),
    max_leaves=6,
)
TREE = {
    "type": "object",
    "properties": {"leaf": {"type": "integer", "minimum": 0, "maximum": 9}, "left": {"$ref": "#/$defs/tree"}},
    "required": ["leaf"],
    "additionalProperties": False,
}


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary.of(tokenizer(), VOCAB_SIZE)


def is_prefix(grammar: str, output: str) -> bool:
    """Whether the output, which may end within a character, can be completed, by another tokenisation of it."""
    ids = tokenizer().encode(output.rstrip("\ufffd"), add_special_tokens=False)
    return compile_grammar(vocabulary().tokenizer, grammar).validate_tokens(ids) == len(ids)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**40))
def test_every_output_is_valid_against_its_schema(pair: Pair, schema: dict[str, Any], seed: int) -> None:
    schema = schema | {"$defs": {"tree": TREE}}
    grammar = SCHEMA(schema)
    requests = [EngineRequest(f"r{i}", PROMPT, params(grammar, seed=seed + i)) for i in range(3)]
    for outputs in pair.finish(*requests).values():
        output = text(outputs)
        if outputs[-1].finish_reason == "stop":
            jsonschema.validate(json.loads(output), schema, jsonschema.Draft202012Validator)
        else:
            assert is_prefix(grammar, output)


# ------------------------------------------------------------------------------------------------------------
# Other grammars

REGEXES = [r"[0-9]{1,3}", r"(ab|cd)+\.", r"[0-9]{4}-[0-9]{2}", r"[^\n]{3,20}\n", r"é?🦜{1,3}", r"(?i)yes|no", r"x*"]


@pytest.mark.parametrize("pattern", REGEXES)
def test_output_matches_its_regex_as_a_whole(pair: Pair, pattern: str) -> None:
    requests = [EngineRequest(f"r{i}", PROMPT, params(REGEX(pattern), seed=i)) for i in range(5)]
    for outputs in pair.finish(*requests).values():
        output = text(outputs)
        if outputs[-1].finish_reason == "stop":
            assert re.fullmatch(pattern, output), output
        else:
            assert is_prefix(REGEX(pattern), output)


def test_output_is_in_a_recursive_grammar(core: EngineCore) -> None:
    grammar = LARK('start: sum\nsum: term | sum "+" term\nterm: /[0-9]+/ | "(" sum ")"')
    requests = [EngineRequest(f"r{i}", PROMPT, params(grammar, seed=i)) for i in range(8)]
    ended = [text(o) for o in finish(core, *requests).values() if o[-1].finish_reason == "stop"]
    assert ended
    for output in ended:
        assert re.fullmatch(r"[0-9+()]+", output)
        eval(re.sub(r"\b0+(?=\d)", "", output))  # Python accepts the same sums, leading zeros apart


def test_a_grammar_that_allows_everything_changes_nothing(core: EngineCore) -> None:
    not_text = {i: -100.0 for i in range(VOCAB_SIZE) if "\ufffd" in tokenizer().decode([i]) or i < 4}
    everything = REGEX(r"(?s).*")
    for fields in ({"temperature": 0.0}, {"seed": 5, "top_p": 0.9}, {"seed": 6, "frequency_penalty": 1.0}):
        free = params(None, logit_bias=not_text, max_tokens=40, **fields)
        assert answer(core, replace(free, grammar=everything)) == answer(core, free)


def test_requests_of_one_batch_do_not_influence_each_other(core: EngineCore) -> None:
    kinds = {"free": params(None, seed=1), "digits": params(REGEX("[0-9]+"), seed=2), "yes": params(REGEX("yes|no"))}
    alone = {name: answer(core, sampling) for name, sampling in kinds.items()}
    together = finish(core, *(EngineRequest(name, PROMPT, sampling) for name, sampling in kinds.items()))
    assert {name: (text(outputs), outputs[-1].finish_reason) for name, outputs in together.items()} == alone


# ------------------------------------------------------------------------------------------------------------
# Ends


def test_the_output_ends_when_nothing_can_follow(core: EngineCore) -> None:
    for stops in (frozenset({EOS}), frozenset[int]()):
        outputs = finish(core, EngineRequest("r", PROMPT, params(REGEX("abc"), stop_token_ids=stops)))["r"]
        assert tokenizer().decode(tokens(outputs)) == "abc", "no stop token is spent"
        assert outputs[-1].finish_reason == "stop"
        assert outputs[-1].token_ids


def test_an_output_that_can_only_be_empty(core: EngineCore) -> None:
    assert answer(core, params(REGEX("(a{3}){0}"))) == ("", "stop")
    outputs = finish(core, EngineRequest("r", PROMPT, params(REGEX("(a{3}){0}"), stop_token_ids=frozenset())))["r"]
    assert (tokens(outputs), outputs[-1].finish_reason) == ([], "stop")


def test_speculation_ends_outputs_where_they_end_without_it(pair: Pair) -> None:
    eager = {EOS: 100.0}
    ends = [
        params(REGEX("abc")),
        params(REGEX("abc"), stop_token_ids=frozenset()),
        params(REGEX("[0-9]*"), min_tokens=5, logit_bias=eager),
        params(REGEX("[0-9]{4}"), min_tokens=50),
        params(REGEX("[0-9]*"), max_tokens=7, stop_token_ids=frozenset()),
        params(REGEX("(a{3}){0}"), stop_token_ids=frozenset()),
    ]
    pair.finish(*(EngineRequest(f"r{i}", PROMPT, sampling) for i, sampling in enumerate(ends)))


def test_stop_tokens_end_complete_outputs_only(core: EngineCore) -> None:
    comma = tokenizer().encode(",")[0]
    bias = {EOS: 100.0, comma: 50.0}
    assert answer(core, params(REGEX("[ab]{4}(🦜)?"), logit_bias=bias, temperature=0))[0][4:] == ""
    output, reason = answer(core, params(REGEX("a(,a)*"), stop_token_ids=frozenset({EOS, comma}), logit_bias=bias))
    assert (output, reason) == ("a", "stop")


def test_min_tokens_holds_the_end_back_while_something_can_follow(core: EngineCore) -> None:
    eager = {EOS: 100.0}
    for least in (0, 5):
        sampling = params(REGEX("[0-9]*"), min_tokens=least, logit_bias=eager, temperature=0)
        outputs = finish(core, EngineRequest("r", PROMPT, sampling))["r"]
        assert len(tokens(outputs)) == least + 1
        assert outputs[-1].finish_reason == "stop"
    assert answer(core, params(REGEX("ab"), min_tokens=50)) == ("ab", "stop")


def test_without_stop_tokens_the_output_goes_on_as_long_as_it_can(core: EngineCore) -> None:
    output, reason = answer(core, params(REGEX("[0-9]*"), stop_token_ids=frozenset(), max_tokens=30))
    assert reason == "length"
    assert output.isdigit()


def test_bias_and_penalties_do_not_break_the_grammar(core: EngineCore) -> None:
    a, b = (tokenizer().encode(c, add_special_tokens=False)[0] for c in "ab")
    sampling = params(
        REGEX("b{10}"), logit_bias={a: 100.0, b: 100.0}, presence_penalty=2.0, repetition_penalty=10.0, top_k=1
    )
    assert answer(core, sampling) == ("b" * 10, "stop")


def test_a_grammar_that_gets_too_complex_fails_its_request_only(core: EngineCore) -> None:
    wide = SCHEMA({"type": "object", "properties": {f"p{i}": {} for i in range(1500)}})
    wrong = REGEX("(a")
    good = EngineRequest("good", PROMPT, params(REGEX("yes")))
    outputs = finish(
        core, EngineRequest("wide", PROMPT, params(wide)), EngineRequest("wrong", PROMPT, params(wrong)), good
    )
    assert outputs["wide"][-1].error is not None
    code, message = outputs["wide"][-1].error
    assert code == "invalid_request"
    assert re.match(r"After 0 tokens the grammar cannot go on: .*max is 2000", message)
    assert outputs["wrong"][-1].error is not None
    assert "unclosed group" in outputs["wrong"][-1].error[1]
    assert text(outputs["good"]) == "yes"


def test_a_dead_end_is_an_error(core: EngineCore) -> None:
    comma = tokenizer().encode(",")[0]
    sampling = params(REGEX("a,a"), stop_token_ids=frozenset({comma}))
    outputs = finish(core, EngineRequest("r", PROMPT, sampling))["r"]
    assert outputs[-1].error is not None
    assert "those that stop it may not" in outputs[-1].error[1]


# ------------------------------------------------------------------------------------------------------------
# Interruptions

OBJECT = SCHEMA({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}})


def test_preemption_changes_nothing(core: EngineCore, folder: str) -> None:
    requests = [EngineRequest(f"r{i}", PROMPT, params(OBJECT, seed=i, max_tokens=60)) for i in range(6)]
    expected = {name: tokens(outputs) for name, outputs in finish(core, *requests).items()}
    small = make_core(folder, kv_memory=core.info.page_bytes * 8, max_model_len=96)
    assert {name: tokens(outputs) for name, outputs in finish(small, *requests).items()} == expected
    assert small.stats().preemptions > 0


def test_a_request_taken_up_again_goes_on_as_it_would_have(core: EngineCore) -> None:
    sampling = params(OBJECT, seed=3, max_tokens=40)
    whole = tokens(finish(core, EngineRequest("r", PROMPT, sampling))["r"])
    for done in (1, len(whole) // 2, len(whole) - 1):
        rest = finish(core, EngineRequest("r", PROMPT, sampling, output_ids=whole[:done]))["r"]
        assert tokens(rest) == whole[done:]


def test_an_abort_forgets_the_request(core: EngineCore) -> None:
    for steps in (0, 3):
        assert core.add(EngineRequest("r", PROMPT, params(OBJECT))) is None
        for _ in range(steps):
            core.step()
        core.abort(["r"], keep_pages=False)
        assert not core.has_work
    assert answer(core, params(REGEX("yes"))) == ("yes", "stop")


# ------------------------------------------------------------------------------------------------------------
# Masks behind drafts


def state(grammar: str, **fields: Any) -> GrammarState:
    return GrammarState(compile_grammar(vocabulary().tokenizer, grammar), vocabulary(), params(grammar, **fields))


def allowed(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize(
    ("grammar", "drafts"),
    [
        (OBJECT, '{"name": "Ara", "age": 7}'),
        (REGEX("[0-9]{1,4}"), "1234"),
        (REGEX("[0-9]{1,4}"), "12a4"),
        (REGEX("a*"), "b"),
        (REGEX("a*"), ""),
    ],
)
def test_masks_behind_drafts_are_those_behind_the_tokens(grammar: str, drafts: str) -> None:
    ids = tokenizer().encode(drafts, add_special_tokens=False) if drafts else []
    speculating, stepping = state(grammar, min_tokens=2), state(grammar, min_tokens=2)
    rows = speculating.masks(ids)
    assert len(rows) == 1 + len(ids)
    for i, row in enumerate(rows[: 1 + stepping.num_allowed(ids)]):
        if i:
            assert stepping.accept([ids[i - 1]]) == 1
        if not stepping.over:
            assert allowed(row) == allowed(stepping.masks()[0])
    again = speculating.masks(ids)
    assert (rows == again).all(), "a look ahead leaves no trace"
    assert not rows[1 + speculating.num_allowed(ids) :].any()


def test_drafts_that_stop_or_are_no_tokens_are_not_allowed() -> None:
    digits = tokenizer().encode("12", add_special_tokens=False)
    one = state(REGEX("[0-9]*"))
    assert one.num_allowed([*digits, EOS]) == len(digits)
    assert one.num_allowed([EOS]) == 0
    assert one.num_allowed([vocabulary().end]) == 0
    assert one.num_allowed(digits) == len(digits), "and the state is sound"


def test_tokens_behind_the_end_do_not_count() -> None:
    digits = tokenizer().encode("123", add_special_tokens=False)
    one = state(REGEX("123"))
    assert one.accept([*digits, EOS, 7]) == len(digits)
    assert one.over


def test_an_error_behind_a_wrong_draft_is_none() -> None:
    wide = SCHEMA({"type": ["object", "string"], "properties": {f"p{i}": {} for i in range(1500)}})
    brace, quote = (tokenizer().encode(c, add_special_tokens=False)[0] for c in '{"')
    one = state(wide)
    rows = one.masks([brace])
    assert {brace, quote} <= allowed(rows[0])
    assert not rows[1].any()
    assert one.error is None
    assert one.accept([quote]) == 1
    assert allowed(one.masks()[0])


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    with pytest.raises(GrammarError, match="not a fast tokenizer"):
        Vocabulary.of(object(), VOCAB_SIZE)  # type: ignore[arg-type]

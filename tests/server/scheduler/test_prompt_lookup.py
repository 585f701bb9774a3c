"""Prompt lookup: against the definition, in loops, in long prompts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.scheduler import PromptLookup
from macaw_server.scheduler.prompt_lookup import MAX_CANDIDATES, MAX_INDEXED, MAX_MATCH, NGRAM


def defined(tokens, limit):
    """The tokens after the longest of the latest matches, looking at every position."""
    end = len(tokens)
    matches = []
    for at in range(end - 1, NGRAM - 1, -1):
        length = 0
        while length < min(at, MAX_MATCH) and tokens[at - length - 1] == tokens[end - length - 1]:
            length += 1
        if length >= NGRAM:
            matches.append((length, at))
    if not matches or limit < 1:
        return []
    longest = max(length for length, _ in matches[:MAX_CANDIDATES])
    start = next(at for length, at in matches if length == longest)
    for _ in range(limit):
        tokens = [*tokens, tokens[start + len(tokens) - end]]
    return tokens[end:]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 20), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_equals_its_definition_however_the_tokens_arrive(tokens, step, limit):
    lookup = PromptLookup()
    for end in range(0, len(tokens) + 1, step):
        assert lookup.propose(tokens[:end], limit) == defined(tokens[:end], limit)


def test_takes_the_longest_match_and_then_the_latest():
    assert PromptLookup().propose([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 2) == [7, 9]
    assert PromptLookup().propose([2, 3, 7, 2, 3, 8, 2, 3], 2) == [8, 2]


def test_a_loop_is_foreseen_at_full_length():
    assert PromptLookup().propose([9, 4, 5, 6, 4, 5, 6], 7) == [4, 5, 6, 4, 5, 6, 4]
    assert PromptLookup().propose([5, 5, 5], 4) == [5, 5, 5, 5]


def test_a_long_prompt_is_indexed_over_several_calls():
    tokens = [*range(2 * MAX_INDEXED), 0, 1]
    lookup = PromptLookup()
    assert [lookup.propose(tokens, 3) for _ in range(3)] == [[], [], [2, 3, 4]]

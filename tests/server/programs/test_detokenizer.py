from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from macaw_server.programs.detokenizer import Detokenizer
from macaw_server.programs.stop_strings import StopStrings
from server.programs.builders import TEXT, byte_level_tokenizer, sentencepiece_style_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE_STYLE = sentencepiece_style_tokenizer()
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCEPIECE_STYLE], ids=["byte-level", "sentencepiece-style"]
)

characters = st.sampled_from([*"ab .,\nthe macaw", *"éü中文😀🦜🇧👩‍👧"]) | st.characters(codec="utf-8")
texts = st.text(characters, max_size=40)
prompts = texts | st.just("<s>") | st.just("<s>中文字符中文字符") | st.just("The macaw</s><s>")


def stream(detokenizer: Detokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    """Feed tokens in pieces of the given sizes (the last one repeats) and collect what comes out."""
    deltas, start = [], 0
    while start < len(token_ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        deltas.append(detokenizer.add(token_ids[start : start + size]).delta)
        start += size
    return [*deltas, detokenizer.flush()]


def at_once(tokenizer: Any, prompt_ids: list[int], token_ids: list[int]) -> str:
    """What the answer adds to the text of the prompt."""
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    return str(tokenizer.decode(prompt_ids + token_ids, skip_special_tokens=True))[len(prompt) :]


@TOKENIZERS
@given(prompt=prompts, answer=texts, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), data=st.data())
@settings(max_examples=120, deadline=None)
def test_deltas_of_any_text_are_what_decoding_at_once_gives(
    tokenizer: Any, prompt: str, answer: str, sizes: list[int], data: st.DataObject
) -> None:
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.bos_token_id]
    token_ids = tokenizer.encode(answer, add_special_tokens=False)
    for _ in range(data.draw(st.integers(0, 3))):  # special tokens anywhere have no text
        token_ids.insert(data.draw(st.integers(0, len(token_ids))), tokenizer.eos_token_id)

    deltas = stream(Detokenizer(tokenizer, prompt_ids), token_ids, sizes)
    assert "".join(deltas) == at_once(tokenizer, prompt_ids, token_ids)


@given(
    prompt=st.lists(st.integers(0, len(BYTE_LEVEL) - 1), min_size=1, max_size=20),
    token_ids=st.lists(st.integers(0, len(BYTE_LEVEL) + 5), max_size=80),
)
@settings(max_examples=100, deadline=None)
def test_deltas_of_any_bytes_are_what_decoding_at_once_gives(prompt: list[int], token_ids: list[int]) -> None:
    """Random tokens of a byte-level vocabulary are mostly invalid UTF-8; ids past its end pad the model's."""
    deltas = stream(Detokenizer(BYTE_LEVEL, prompt), token_ids, [1])
    assert "".join(deltas) == at_once(BYTE_LEVEL, prompt, token_ids)


@pytest.mark.parametrize("answer", TEXT)
@TOKENIZERS
def test_nothing_is_held_back_but_unfinished_characters(tokenizer: Any, answer: str) -> None:
    prompt_ids = tokenizer.encode("The", add_special_tokens=False)
    token_ids = tokenizer.encode(answer, add_special_tokens=False)
    detokenizer, text, raw = Detokenizer(tokenizer, prompt_ids), "", b""
    for token_id in token_ids:
        text += detokenizer.add([token_id]).delta
        raw += bytes(detokenizer.token_text(token_id).bytes)
        assert text == raw.decode(errors="ignore")
    assert detokenizer.flush() == ""
    assert detokenizer.num_tokens == len(token_ids)


class CountingTokenizer:
    """A real tokenizer that counts how many tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(token_ids)
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def byte_tokens(text: bytes) -> list[int]:
    """One token for each byte, in the byte-level vocabulary."""
    alphabet = {bytes(Detokenizer(BYTE_LEVEL, [2]).token_text(i).bytes): i for i in range(2, 258)}
    return [alphabet[bytes([byte])] for byte in text]


@pytest.mark.parametrize(
    "pattern",
    [
        byte_tokens(b"a"),
        byte_tokens(b"\x80"),  # never a character
        byte_tokens("🦜".encode()),
        byte_tokens("\ufffd".encode()),  # a real replacement character
        [BYTE_LEVEL.eos_token_id],
        [len(BYTE_LEVEL) + 3],  # pads the model's vocabulary
    ],
    ids=["letter", "invalid", "emoji", "replacement", "special", "padding"],
)
def test_the_work_is_linear_in_the_tokens(pattern: list[int]) -> None:
    counting = CountingTokenizer(BYTE_LEVEL)
    prompt_ids = byte_tokens(b"a prompt " * 1000)
    token_ids = (pattern * 2000)[:2000]
    deltas = stream(Detokenizer(counting, prompt_ids), token_ids, [1])  # type: ignore[arg-type]
    assert counting.num_decoded < 30 * len(token_ids)
    assert "".join(deltas) == at_once(BYTE_LEVEL, prompt_ids, token_ids)


class MisalignedTokenizer:
    """A vocabulary as merges across characters make it: every token ends in the middle of a parrot."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        parrot = "🦜".encode()
        pieces = [parrot[:2], parrot[2:] + parrot[:2]]
        return b"".join(pieces[i] for i in token_ids).decode(errors="replace")


def test_text_is_released_although_no_token_ends_with_a_character() -> None:
    counting = CountingTokenizer(MisalignedTokenizer())
    detokenizer = Detokenizer(counting, [0])  # type: ignore[arg-type]
    streamed = "".join(detokenizer.add([1]).delta for _ in range(500))
    assert streamed == "🦜" * 499  # the first completes what the prompt has shown as a replacement character
    assert detokenizer.flush() == "\ufffd"
    assert counting.num_decoded < 30 * 500


def test_tokens_without_text_do_not_tear_a_character_apart() -> None:
    first, *rest = byte_tokens("🦜".encode())
    padding = [len(BYTE_LEVEL) + 3] * 20
    detokenizer = Detokenizer(BYTE_LEVEL, byte_tokens(b"a"))
    assert detokenizer.add([first, *padding]).delta == ""
    assert detokenizer.add([*rest, *byte_tokens(b"b")]).delta == "🦜b"


@pytest.mark.parametrize("num_characters", [*range(1, 8), 30, 40])
@pytest.mark.parametrize("character", ["é", "中", "🦜"])
def test_the_prompt_may_end_with_a_run_of_bytes(character: str, num_characters: int) -> None:
    """Bytes that are cut off from the start of their character would spoil the whole run."""
    prompt_ids = SENTENCEPIECE_STYLE.encode(character * num_characters, add_special_tokens=False)
    token_ids = SENTENCEPIECE_STYLE.encode(f"a{character * 5}b", add_special_tokens=False)[2:]
    deltas = stream(Detokenizer(SENTENCEPIECE_STYLE, prompt_ids), token_ids, [1])
    assert "".join(deltas) == f"{character * 5}b"


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
@example(text="aaab", stops=["aab"], cuts=[])
@example(text="ab", stops=["b", "ab"], cuts=[])
@settings(max_examples=200, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    search, out, found = StopStrings(stops), "", None
    for start, end in pairwise(bounds):
        if found is None:
            released, found = search.add(text[start:end])
            out += released
            kept = len(text[:end]) - len(out)
            if found is None and kept:  # nothing is held back that cannot become a stop string
                assert any(stop.startswith(text[end - kept : end]) for stop in stops)

    ends = sorted((text.find(s) + len(s), -len(s), s) for s in stops if s in text)
    if ends:
        end, _, stop = ends[0]
        assert (out, found) == (text[: end - len(stop)], stop)
    else:
        assert (out + search.flush(), found) == (text, None)


@TOKENIZERS
@given(answer=texts, stop=st.sampled_from(["macaw", "\n", "中文", "🦜", ". ", "the m"]), size=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_answer_ends_before_the_stop_string(tokenizer: Any, answer: str, stop: str, size: int) -> None:
    prompt_ids = tokenizer.encode("The", add_special_tokens=False)
    token_ids = tokenizer.encode(f"{answer}{stop} and {stop} more", add_special_tokens=False)
    whole = at_once(tokenizer, prompt_ids, token_ids)
    detokenizer = Detokenizer(tokenizer, prompt_ids, [stop])
    assert "".join(stream(detokenizer, token_ids, [size])) == whole[: whole.index(stop)]
    assert detokenizer.stopped_by == stop
    # the tokens up to the one that completes the stop string, and not one more
    assert stop in at_once(tokenizer, prompt_ids, token_ids[: detokenizer.num_tokens])
    assert stop not in at_once(tokenizer, prompt_ids, token_ids[: detokenizer.num_tokens - 1])


def test_after_a_stop_string_nothing_more_comes() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [2], ["END"])
    first = detokenizer.add(byte_tokens(b"so E"))
    assert first == ("so ", None)
    assert detokenizer.add(byte_tokens(b"ND and")) == ("", "END")
    assert detokenizer.add(byte_tokens(b"more")) == ("", "END")
    assert detokenizer.flush() == ""
    assert detokenizer.num_tokens == len("so END")


def test_what_only_looked_like_a_stop_string_comes_at_the_end() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [2], ["ENDE"])
    assert detokenizer.add(byte_tokens(b"THE END")).delta == "THE "
    assert detokenizer.flush() == "END"
    assert detokenizer.flush() == ""


def test_special_tokens_are_shown_on_request() -> None:
    ids = [BYTE_LEVEL.bos_token_id, *byte_tokens(b"a"), BYTE_LEVEL.eos_token_id]
    assert Detokenizer(BYTE_LEVEL, [2]).add(ids).delta == "a"
    assert Detokenizer(BYTE_LEVEL, [2], skip_special_tokens=False).add(ids).delta == "<s>a</s>"


@TOKENIZERS
@given(answer=texts)
@settings(max_examples=100, deadline=None)
def test_bytes_of_single_tokens_join_to_the_text(tokenizer: Any, answer: str) -> None:
    token_ids = tokenizer.encode(answer, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [tokenizer.bos_token_id])
    joined = b"".join(bytes(detokenizer.token_text(token_id).bytes) for token_id in token_ids).decode()
    anchor = tokenizer.encode("a", add_special_tokens=False)
    assert joined == at_once(tokenizer, anchor, token_ids)


def test_text_of_a_single_token() -> None:
    space_the = SENTENCEPIECE_STYLE.convert_tokens_to_ids("▁")
    detokenizer = Detokenizer(SENTENCEPIECE_STYLE, [1])
    assert detokenizer.token_text(space_the) == (" ", [32])
    assert detokenizer.token_text(2).text == "</s>"
    assert detokenizer.token_text(SENTENCEPIECE_STYLE.convert_tokens_to_ids("<0xF0>")).bytes == [0xF0]


def test_a_long_stop_string_costs_only_what_the_text_matches_of_it() -> None:
    stop = "ab" * 500_000
    tracemalloc.start()
    try:
        search = StopStrings([stop])
        assert search.add("abab" * 10 + "x") == ("abab" * 10 + "x", None)
        assert tracemalloc.get_traced_memory()[1] < 100_000  # bytes; a table of the whole string has millions
    finally:
        tracemalloc.stop()

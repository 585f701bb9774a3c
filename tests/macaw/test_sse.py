from hypothesis import example, given
from hypothesis import strategies as st

from macaw._sse import ServerSentEvent, SSEDecoder


def decode(*chunks):
    decoder = SSEDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def test_one_event_has_type_data_and_id():
    assert decode(b"event: add\nid: 7\ndata: hi\n\n") == [ServerSentEvent("add", "hi", "7")]


def test_lines_of_data_are_joined_by_newline():
    assert decode(b"data: YHOO\ndata: +2\ndata: 10\n\n") == [ServerSentEvent("message", "YHOO\n+2\n10", "")]


def test_comments_and_unknown_fields_are_skipped():
    assert decode(b": ping\n\n:\nretry: 10\nfoo: bar\ndata: x\n\n: ping\n\n") == [ServerSentEvent("message", "x", "")]


def test_one_space_after_the_colon_is_no_data():
    assert [event.data for event in decode(b"data:x\n\ndata: x\n\ndata:  x\n\n")] == ["x", "x", " x"]


def test_field_without_colon_is_empty():
    assert [event.data for event in decode(b"data\n\ndata\ndata\n\ndata:")] == ["", "\n"]


def test_event_without_data_is_none_and_does_not_name_the_next():
    assert decode(b"event: add\n\ndata: x\n\n") == [ServerSentEvent("message", "x", "")]


def test_id_stays_until_changed_and_may_not_hold_nul():
    events = decode(b"id: 1\ndata: a\n\ndata: b\n\nid: 2\x003\ndata: c\n\nid\ndata: d\n\n")
    assert [event.id for event in events] == ["1", "1", "1", ""]


def test_byte_order_mark_at_the_start_is_dropped():
    assert decode(b"\xef\xbb\xbfdata: x\n\n") == [ServerSentEvent("message", "x", "")]


def test_line_ends_may_be_mixed():
    assert [event.data for event in decode(b"data: a\r\n\rdata: b\r\r\ndata: c\n\r\n")] == ["a", "b", "c"]


def test_only_cr_and_lf_end_lines():
    text = "a\u2028b\u0085c\x0bd\x0ce"
    assert [event.data for event in decode(f"data: {text}\n\n".encode())] == [text]


def test_event_comes_with_its_last_byte_even_where_a_line_feed_may_follow():
    decoder = SSEDecoder()
    assert [event.data for event in decoder.feed(b"data: a\r\n\r")] == ["a"]
    assert list(decoder.feed(b"\n")) == []
    assert [event.data for event in decoder.feed(b"data: b\r\r")] == ["b"]


def test_cut_off_event_is_dropped():
    assert [event.data for event in decode(b"data: a\n\ndata: b\n")] == ["a"]


def test_bytes_that_are_not_utf8_are_replaced():
    assert [event.data for event in decode(b"data: \xff\n\n")] == ["\ufffd"]


LINES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=8)


@given(
    st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(min_value=1, max_value=7), min_size=1),
)
@example([["päron", "🦜"], ["\ufeff"]], "\r\n", [1])
def test_chunk_boundaries_do_not_matter(events, line_end, sizes):
    """What is sent as lines comes out as the same lines, however the bytes are cut."""
    lines = [line for event in events for line in [*(f"data: {line}" for line in event), ": ping", ""]]
    stream = "".join(line + line_end for line in lines).encode()
    chunks, start, i = [], 0, 0
    while start < len(stream):
        size = sizes[i % len(sizes)]
        chunks.append(stream[start : start + size])
        start, i = start + size, i + 1
    assert [event.data for event in decode(*chunks)] == ["\n".join(event) for event in events]
    assert decode(*chunks) == decode(stream)

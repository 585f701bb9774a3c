"""The planner: what it shares, that it covers everything once, and that its choices cost least."""

from __future__ import annotations

import ast
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import macaw_kernels
from kernels.batches import THREE_LEVELS, Seq, make_batch
from macaw_kernels import (
    ALWAYS_SHARE,
    CPU_TORCH,
    NEVER_SHARE,
    AttentionPlan,
    DeviceProfile,
    HeadConfig,
    Planner,
    WorkItem,
    plan,
)

HEADS = HeadConfig(8, 2, 64, 64)
PAGE_SIZE = 4
PROFILES = [ALWAYS_SHARE, NEVER_SHARE, CPU_TORCH, DeviceProfile("some", 20.0, 4.0, 10.0, 1.0, 1 << 20)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """Block tables over few page ids, so that prefixes coincide; context and query lengths."""
    tables, contexts, queries = [], [], []
    for _ in range(draw(st.integers(0, 9))):
        # A page id is unique to its place, as in a radix tree: what may differ is which one is there.
        table = [10 * i + draw(st.integers(0, 2)) for i in range(draw(st.integers(1, 7)))]
        context = draw(st.integers(1, len(table) * PAGE_SIZE))
        tables.append(table)
        contexts.append(context)
        queries.append(draw(st.just(1) | st.integers(1, context)))
    return tables, contexts, queries


def keys_of(item: WorkItem) -> list[tuple[int, int]]:
    """(page, offset) of each of an item's keys."""
    return [(int(item.pages[i // PAGE_SIZE]), i % PAGE_SIZE) for i in range(item.kv_len)]


@settings(max_examples=200, deadline=None)
@given(batch=batches(), profile=st.sampled_from(PROFILES))
def test_every_row_sees_every_visible_key_exactly_once(
    batch: tuple[list[list[int]], list[int], list[int]], profile: DeviceProfile
) -> None:
    assert_covers_once(plan(*batch, HEADS, profile, PAGE_SIZE), *batch)


def assert_covers_once(made: AttentionPlan, tables: list[list[int]], contexts: list[int], queries: list[int]) -> None:
    seen: list[list[tuple[int, int]]] = [[] for _ in range(made.num_tokens)]
    for item in made.own() + made.shared:
        assert item.kv_start % PAGE_SIZE == 0
        assert len(item.pages) == -(-item.kv_len // PAGE_SIZE)
        for row in item.rows.tolist():
            visible = made.positions[row] + 1 - item.kv_start
            seen[row] += keys_of(item)[: max(visible, 0)]
    expected = [
        [(table[p // PAGE_SIZE], p % PAGE_SIZE) for p in range(position + 1)]
        for table, context, query in zip(tables, contexts, queries, strict=True)
        for position in range(context - query, context)
    ]
    assert [sorted(row) for row in seen] == [sorted(row) for row in expected]
    for item in made.shared:  # no masks in phase 1
        assert (made.positions[item.rows] >= item.kv_start + item.kv_len).all()
        assert len(item.rows) > 1
    assert made.num_kv_tokens <= made.num_kv_tokens_unshared == sum(contexts)


@settings(max_examples=100, deadline=None)
@given(batch=batches(), profile=st.sampled_from(PROFILES))
def test_the_choice_costs_least(batch: tuple[list[list[int]], list[int], list[int]], profile: DeviceProfile) -> None:
    """Brute force: try every set of trie nodes as the shared ones."""
    tables, contexts, queries = batch
    full = plan(tables, contexts, queries, HEADS, ALWAYS_SHARE, PAGE_SIZE)
    nodes = [(frozenset(item.rows.tolist()), item.kv_start + item.kv_len) for item in full.shared]
    nodes = nodes[:8]
    row_of_sequence = np.cumsum(queries) - queries if queries else []

    def cost(shared: list[tuple[frozenset[int], int]]) -> float:
        tokens, states = 0, 0

        def start_of(row: int, below: int) -> int:
            """Where the last shared node on the row's path ended, above `below`."""
            return max((end for rows, end in shared if row in rows and end < below), default=0)

        for rows, end in shared:
            tokens += end - start_of(min(rows), end)
            states += len(rows)
        for row, context in zip(row_of_sequence, contexts, strict=True):
            tokens += context - start_of(int(row), context + 1)
        state_ns = HEADS.num_q_heads * HEADS.v_head_dim * profile.state_element_ns
        fixed = 1000 * profile.share_us * len(shared) if shared else 0.0
        return fixed + states * state_ns + tokens * HEADS.kv_elements * profile.kv_element_ns

    made = plan(tables, contexts, queries, HEADS, profile, PAGE_SIZE)
    chosen = [(frozenset(item.rows.tolist()), item.kv_start + item.kv_len) for item in made.shared]
    assert set(chosen) <= {(frozenset(i.rows.tolist()), i.kv_start + i.kv_len) for i in full.shared}
    if len(full.shared) > 8:
        return
    candidates = (
        [node for node, keep in zip(nodes, kept, strict=True) if keep]
        for kept in product([False, True], repeat=len(nodes))
    )
    assert cost(chosen) == pytest.approx(min(map(cost, candidates)))


def same(a: AttentionPlan, b: AttentionPlan) -> bool:
    def flat(made: AttentionPlan) -> list[Any]:
        items = [[i.rows.tolist(), i.pages.tolist(), i.kv_start, i.kv_len] for i in made.own() + made.shared]
        return [made.positions.tolist(), made.max_page, *items]

    return flat(a) == flat(b)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), profile=st.sampled_from(PROFILES))
def test_step_after_step_is_planned_as_from_nothing(data: st.DataObject, profile: DeviceProfile) -> None:
    """Sequences decode (some tokens a step), now and then get a common page, and the batch changes."""
    planner = Planner(HEADS, profile, PAGE_SIZE)
    tables, contexts, queries = data.draw(batches())
    for _ in range(data.draw(st.integers(1, 6))):
        made = planner.plan(tables, contexts, queries)
        assert_covers_once(made, tables, contexts, queries)
        fresh = plan(tables, contexts, queries, HEADS, profile, PAGE_SIZE)
        assert made.slot_mapping().tolist() == fresh.slot_mapping().tolist()
        if set(queries) == {1}:  # decisions are kept while the number of rows is about the same
            assert same(made, fresh)
        change = data.draw(st.sampled_from(["decode"] * 6 + ["speculate", "leave", "replace"]))
        if change == "leave" and tables:
            gone = data.draw(st.integers(0, len(tables) - 1))
            tables, contexts, queries = (
                [x for i, x in enumerate(xs) if i != gone] for xs in (tables, contexts, queries)
            )
        if change == "replace" and tables:
            some = data.draw(st.integers(0, len(tables) - 1))
            tables[some] = [page + 1000 for page in tables[some]]
        starts = list(contexts)
        queries = [data.draw(st.integers(1, 5)) if change == "speculate" else 1 for _ in tables]
        contexts = [start + query for start, query in zip(starts, queries, strict=True)]
        for table, context in zip(tables, contexts, strict=True):
            while len(table) * PAGE_SIZE < context:
                table.append(10 * len(table) + data.draw(st.integers(0, 2)))


def test_a_decode_step_takes_the_decisions_over() -> None:
    """Not by its time but by what it is given to read: a table that may only be compared, not converted."""
    planner = Planner(HEADS, ALWAYS_SHARE, PAGE_SIZE)
    tables = [[1, 2, 3], [1, 2, 4]]
    first = planner.plan(tables, [9, 10], [1, 1])
    second = planner.plan(tables, [10, 11], [1, 1])
    assert second.block_tables is first.block_tables
    assert second.own_starts is first.own_starts
    third = planner.plan([[1, 2, 3], [1, 2, 3]], [11, 12], [1, 1])
    assert third.block_tables is not first.block_tables


def test_lists_and_arrays_plan_alike_and_always_the_same() -> None:
    batch = make_batch(THREE_LEVELS, HEADS)
    first = batch.plan(ALWAYS_SHARE)
    assert same(first, batch.plan(ALWAYS_SHARE))
    arrays = plan(
        [np.array(table, dtype=np.int32) for table in batch.block_tables],
        np.array(batch.context_lens),
        np.array(batch.query_lens),
        HEADS,
        ALWAYS_SHARE,
        batch.page_size,
    )
    assert same(first, arrays)


def test_three_levels() -> None:
    made = make_batch(THREE_LEVELS, HEADS).plan(ALWAYS_SHARE)
    sharing = [(len(item.rows), item.kv_start, item.kv_len) for item in made.shared]
    # Rows: decodes 0, 1, 2, a chunk of 23, decodes 4 and 5, a chunk of 33 (all with "system"), and three
    # loners.
    assert sharing == [(3 + 23 + 2 + 33, 0, 48), (3 + 23, 48, 32), (2, 48, 16), (2, 80, 32)]
    assert [item.kv_start for item in made.own()] == [112, 112, 80, 80, 64, 64, 48, 0, 0, 0]


def test_a_node_too_short_to_share_alone_goes_down_to_its_children() -> None:
    sequences = [Seq({"stub": 1, name: 40}, own=9) for name in "aabb"]
    profile = DeviceProfile("picky", 60.0, 1.0, 0.0, 1.0, 1 << 20)
    made = make_batch(sequences, HEADS).plan(profile)
    assert [(item.rows.tolist(), item.kv_start, item.kv_len) for item in made.shared] == [
        ([0, 1], 0, 41 * 16),
        ([2, 3], 0, 41 * 16),
    ]


def test_only_pages_before_the_first_query_are_shared() -> None:
    """The chunk starts within the third page of the run: it shares two, the decodes share the rest."""
    sequences = [Seq({"doc": 6}, own=0, query=60), Seq({"doc": 6}, own=3), Seq({"doc": 6}, own=7)]
    made = make_batch(sequences, HEADS).plan(ALWAYS_SHARE)
    assert [(len(item.rows), item.kv_start, item.kv_len) for item in made.shared] == [
        (62, 0, 32),
        (2, 32, 64),
    ]
    assert made.own()[0].kv_start == 32


def test_never_share_is_one_item_per_sequence() -> None:
    made = make_batch(THREE_LEVELS, HEADS).plan(NEVER_SHARE)
    assert not made.shared
    assert made.num_kv_tokens == made.num_kv_tokens_unshared


def test_the_cpu_profile_shares_what_is_long_and_wide_only() -> None:
    def shares(pages: int, batch: int) -> bool:
        return bool(make_batch([Seq({"doc": pages}, own=9)] * batch, HEADS).plan(CPU_TORCH).shared)

    assert shares(pages=128, batch=8)
    assert not shares(pages=1, batch=8)
    assert not shares(pages=8, batch=2)
    assert not shares(pages=128, batch=1)


@pytest.mark.parametrize(
    ("tables", "contexts", "queries", "page_size", "message"),
    [
        ([[0]], [3], [0], 4, "sequence 0: query_len 0"),
        ([[0], [1]], [3, 3], [1, 4], 4, "sequence 1: query_len 4 with context_len 3"),
        ([[0, 1], [2]], [8, 5], [1, 1], 4, "sequence 1: a context of 5 tokens needs 2 pages of 4, .* has 1"),
        ([[0, -1]], [8], [1], 4, "sequence 0: negative page id -1"),
        ([[0]], [3, 3], [1], 4, "each sequence needs one of each"),
        ([[0]], [3], [1], 0, "page_size is 0"),
    ],
)
def test_refused(
    tables: list[list[int]], contexts: list[int], queries: list[int], page_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tables, contexts, queries, HEADS, CPU_TORCH, page_size)


@pytest.mark.parametrize(
    ("heads", "message"), [((6, 4, 64, 64), "6 query heads over 4 KV heads"), ((4, 2, 0, 64), "at least 1")]
)
def test_head_configs_refused(heads: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(*heads)


@pytest.mark.parametrize("module", ["planner", "types", "profiles"])
def test_planning_needs_no_torch(module: str) -> None:
    tree = ast.parse((Path(macaw_kernels.__file__).parent / f"{module}.py").read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= {
        "__future__",
        "collections.abc",
        "dataclasses",
        "json",
        "logging",
        "macaw_kernels.cpu.build",  # where the cache is; it imports torch only to load the library
        "macaw_kernels.types",
        "math",
        "numpy",
        "numpy.typing",
        "os",
        "pathlib",
        "typing",
    }

"""Scattering keys and values into pages."""

from __future__ import annotations

import pytest
import torch

from macaw_kernels import store_kv


def test_tokens_land_in_their_slots_and_nothing_else_changes() -> None:
    k_pages, v_pages = torch.zeros(4, 8, 2, 16), torch.zeros(4, 8, 2, 12)
    k, v = torch.randn(5, 2, 16), torch.randn(5, 2, 12)
    slots = [31, 0, 8, 9, 15]
    store_kv(k, v, k_pages, v_pages, torch.tensor(slots))
    for i, slot in enumerate(slots):
        assert torch.equal(k_pages[slot // 8, slot % 8], k[i])
        assert torch.equal(v_pages[slot // 8, slot % 8], v[i])
    assert (k_pages != 0).any(-1).any(-1).sum() == len(slots)


def test_a_slot_outside_is_an_error() -> None:
    pages = torch.zeros(2, 4, 1, 8)
    new = torch.ones(1, 1, 8)
    with pytest.raises(IndexError):
        store_kv(new, new, pages, pages.clone(), torch.tensor([8]))

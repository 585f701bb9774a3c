"""The best that a prefix cache could do: one that is infinite, knows every prompt at once, and has no pages."""

from __future__ import annotations

from collections.abc import Mapping

from macaw_server.workloads import CallSpec, ProgramSpec, Text

_Trie = dict[str, "_Trie"]


class InfiniteCache:
    """A trie of texts per tenant: the parts of a prompt are shared whole or not at all."""

    def __init__(self) -> None:
        self._roots: dict[str, _Trie] = {}

    def look_up(self, program: ProgramSpec, calls: Mapping[str, CallSpec], call: CallSpec) -> int:
        """Tokens of a call's prompt that were computed before, as prompt or as answer; all but one at most.

        The prompt and the answer to come are known from now on.
        """
        node = self._roots.setdefault(program.tenant, {})
        shared, total, is_known = 0, 0, True
        for part in call.parts:
            if isinstance(part, Text):
                key, length = part
            else:
                key, length = f"{program.id}\0{part.call}", calls[part.call].output_len
            total += length
            if is_known and key in node:
                shared += length
            else:
                is_known = False
            node = node.setdefault(key, {})
        node.setdefault(f"{program.id}\0{call.id}", {})
        return min(shared, total - 1)

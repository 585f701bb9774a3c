"""Whose turn it is: service received so far, by tenant and by program. Pure.

Tenants share an engine by the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(OSDI 2024): whoever has received the least service per weight goes first, and who comes back from a pause starts at the
least that anybody who waits has, so that idle time is not saved up.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

OUTPUT_SERVICE = 2.0
"""Service of an output token; a prompt token that is computed counts 1, and one found in the cache nothing."""
MAX_PROGRAMS = 16_384
"""Programs whose service is remembered, the latest served ones."""


@dataclass(slots=True)
class _Tenant:
    service: float = 0.0  # received, divided by the weight
    num_waiting: int = 0
    in_heap: bool = False


class FairShares:
    """Weighted service of tenants; O(log tenants) per request that comes to wait, O(1) per charge.

    Only those count whose requests wait: one whose only request runs for long cannot be served more, and a newcomer
    that started as low as that one would keep everybody else waiting until it has caught up.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._heap: list[tuple[float, str]] = []  # each name once; what is stored may be less than what is true by now

    def enter(self, name: str) -> None:
        """One more request of this tenant waits."""
        tenant = self._tenants.setdefault(name, _Tenant())
        if tenant.num_waiting == 0:
            tenant.service = max(tenant.service, self._least())
            if not tenant.in_heap:
                heapq.heappush(self._heap, (tenant.service, name))
                tenant.in_heap = True
        tenant.num_waiting += 1

    def leave(self, name: str) -> None:
        """One request of this tenant waits no more."""
        tenant = self._tenants[name]
        tenant.num_waiting -= 1
        assert tenant.num_waiting >= 0, f"tenant {name!r} left more often than it entered"

    def charge(self, name: str, service: float, weight: float) -> None:
        """Note service; a tenant of weight 2 is charged half."""
        self._tenants[name].service += service / weight

    def service(self, name: str) -> float:
        """What a tenant has received. Never falls."""
        tenant = self._tenants.get(name)
        return 0.0 if tenant is None else tenant.service

    def _least(self) -> float:
        """The least service among those that wait; if nobody does, the most of those that did last."""
        while self._heap:
            service, name = self._heap[0]
            tenant = self._tenants[name]
            if tenant.service > service:
                heapq.heapreplace(self._heap, (tenant.service, name))
            elif tenant.num_waiting or len(self._heap) == 1:
                return service
            else:
                heapq.heappop(self._heap)
                tenant.in_heap = False
        return 0.0


class AttainedService:
    """Service by program, whoever asks: of the latest `MAX_PROGRAMS`."""

    def __init__(self) -> None:
        self._service: OrderedDict[str, float] = OrderedDict()

    def charge(self, program_id: str, service: float) -> None:
        """Note service."""
        self._service[program_id] = self._service.pop(program_id, 0.0) + service
        if len(self._service) > MAX_PROGRAMS:
            self._service.popitem(last=False)

    def __getitem__(self, program_id: str) -> float:
        return self._service.get(program_id, 0.0)

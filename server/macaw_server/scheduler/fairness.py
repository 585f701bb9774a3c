"""Whose turn it is: service received so far, by tenant and by program. Pure.

Tenants share an engine by the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(OSDI 2024): whoever has received the least service per weight goes first, and who comes back from a pause starts at the
least that anybody present has, so that idle time is not saved up.
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
    num_present: int = 0


class FairShares:
    """Weighted service of tenants that have requests here; O(log tenants) per request, O(1) per charge."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._present: list[tuple[float, str]] = []  # a heap; what is stored may be less than what is true by now

    def enter(self, name: str) -> None:
        """One more request of this tenant is here."""
        tenant = self._tenants.setdefault(name, _Tenant())
        if tenant.num_present == 0:
            tenant.service = max(tenant.service, self._least())
            heapq.heappush(self._present, (tenant.service, name))
        tenant.num_present += 1

    def leave(self, name: str) -> None:
        """One request of this tenant has ended."""
        tenant = self._tenants[name]
        tenant.num_present -= 1
        assert tenant.num_present >= 0, f"tenant {name!r} left more often than it entered"

    def charge(self, name: str, service: float, weight: float) -> None:
        """Note service; a tenant of weight 2 is charged half."""
        self._tenants[name].service += service / weight

    def service(self, name: str) -> float:
        """What a tenant has received. Never falls while it is here."""
        tenant = self._tenants.get(name)
        return 0.0 if tenant is None else tenant.service

    def _least(self) -> float:
        """The least service among those present; the last known one if nobody is."""
        while self._present:
            service, name = self._present[0]
            tenant = self._tenants[name]
            if tenant.num_present and tenant.service == service:
                return service
            if tenant.num_present:
                heapq.heapreplace(self._present, (tenant.service, name))
            elif len(self._present) == 1:
                return tenant.service
            else:
                heapq.heappop(self._present)
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

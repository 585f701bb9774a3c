"""Ten times the load that the engine can do, against the whole service: what is held stays bounded."""

import asyncio

from macaw.errors import OverloadedError
from macaw_server.service.types import NamedTenant
from server.service.harness import ScriptedEngine, program, until

LIMIT, PER_STEP, NUM_STEPS = 24, 2, 150


class SlowEngine(ScriptedEngine):
    """Works on the few calls that came first, and only when told to."""

    def __init__(self):
        super().__init__({"Say": "yes"}, held=True)

    @property
    def active(self):
        return list(self._active)[:PER_STEP]


async def test_an_open_loop_at_ten_times_the_rate(make):
    engine = SlowEngine()
    tenants = (NamedTenant("greedy", ("g",)), NamedTenant("modest", ("m",)))
    service = make(engine, max_live_calls=LIMIT, tenants=tenants)
    greedy, modest = (service.tenants.authenticate(f"Bearer {key}") for key in "gm")
    accepted, refused, clients = [], {greedy: 0, modest: 0}, set()

    async def ask(tenant, number):
        try:
            run = await service.submit(tenant, program((f"c{number}", "Say yes"), targets=[f"c{number}.out"]))
        except OverloadedError as error:
            refused[tenant] += error.retry_after_s is not None
            return
        accepted.append(run)
        with run.attached():
            await run.wait()

    def settled():
        """All are refused, or in the engine."""
        num_open = sum(not client.done() for client in clients)
        return num_open == service.num_live_calls == len(engine._active)

    for step in range(NUM_STEPS):
        for tenant in [greedy] * 10 * PER_STEP + [modest] * (step % 4 == 0):
            clients.add(asyncio.create_task(ask(tenant, len(clients))))
        await until(settled)
        assert service.num_live_calls == len(engine._active) <= LIMIT
        assert len(service._live) <= LIMIT
        engine.step()
    engine.held = False
    engine._pump()
    await asyncio.gather(*clients)
    assert all(run.program.status == "completed" for run in accepted), "what was accepted is done"
    assert refused[greedy] > 8 * PER_STEP * NUM_STEPS
    assert refused[modest] == 0
    assert service.num_live_calls == 0

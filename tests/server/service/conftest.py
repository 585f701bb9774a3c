import pytest

from server.service.harness import ScriptedEngine, make_service


@pytest.fixture
async def make():
    """Makes a service over an engine; closed after the test."""
    services = []

    def factory(engine=None, **config):
        services.append(make_service(engine or ScriptedEngine(), **config))
        return services[-1]

    yield factory
    for service in services:
        await service.close()

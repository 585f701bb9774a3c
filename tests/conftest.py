"""Fixtures for all tests: one server with a real engine per test process."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: test processes share two cores

import pytest
from hypothesis import HealthCheck, settings

from macaw import MacawClient
from macaw_server.serve import LocalServer
from noise import NOISE

# Nothing is timed: machines are shared. In CI the same examples in each run: what is new is found by those who develop.
settings.register_profile(
    "macaw", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("macaw")

TENANTS = ("tenant-a", "tenant-b")


@pytest.fixture(scope="session")
def local_server() -> Iterator[LocalServer]:
    """The whole server in this process, with a model of noise in float32 and two tenants."""
    with LocalServer(**NOISE, dtype="float32", max_model_len=2048, api_key=TENANTS) as server:
        yield server


@pytest.fixture
def client(local_server: LocalServer) -> Iterator[MacawClient]:
    """A client of the first tenant."""
    with MacawClient(local_server.url, TENANTS[0]) as client:
        yield client

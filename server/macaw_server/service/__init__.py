"""The asyncio side of programs: renders prompts, drives the engine, turns tokens into events."""

from macaw_server.service.program_run import ProgramRun
from macaw_server.service.program_service import ProgramService
from macaw_server.service.types import ServedModel, ServiceConfig, Tenant

__all__ = ["ProgramRun", "ProgramService", "ServedModel", "ServiceConfig", "Tenant"]

"""What applications ask of a server: programs by shape and length, without their text. Pure, and equal by seed.

The simulator runs them as they are; a benchmark turns the same programs into text.
"""

from macaw_server.workloads.generators import WORKLOADS, WorkloadOptions, make_workload
from macaw_server.workloads.trace import BLOCK_SIZE, TraceError, read_trace, write_trace
from macaw_server.workloads.types import CallSpec, Output, Part, ProgramSpec, Text

__all__ = [
    "BLOCK_SIZE",
    "WORKLOADS",
    "CallSpec",
    "Output",
    "Part",
    "ProgramSpec",
    "Text",
    "TraceError",
    "WorkloadOptions",
    "make_workload",
    "read_trace",
    "write_trace",
]

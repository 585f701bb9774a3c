"""What all wire types share."""

from __future__ import annotations

from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

MAX_SCHEMA_DEPTH = 64
"""The deepest accepted nesting of objects and lists in a JSON schema."""


class WireModel(BaseModel):
    """Base of everything on the wire: unknown fields are refused, no silent type conversion.

    Schemas are built at import. `defer_build` would only move the same time to the first use, where pydantic
    before 2.14 builds them without a lock: two threads could then see a half-built model.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def depth_is_bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself, if it is not nested too deeply. Raises `ValueError`."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        parents = [list(node.values()) if isinstance(node, dict) else node for node in level]
        level = [child for children in parents for child in children if isinstance(child, dict | list)]
        if not level:
            return schema
    raise ValueError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep; name its parts under $defs")


def refuse_field(field: str, why: str) -> NoReturn:
    """Raise the error that one field of a model is wrong beside the others; from a validator of the model."""
    raise PydanticCustomError("field", "{why}", {"field": field, "why": why})

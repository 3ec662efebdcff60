"""The base of every configuration value: frozen, and strict about keys it does not know."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# A number that float32 holds: neither NaN nor infinite.
Float32 = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]
# How many; where a file is made up for a test or a text model, none.
Count = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    """A value object. Unknown keys are refused, so that a typo is an error and not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

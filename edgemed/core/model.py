"""The base of every configuration value: frozen, and strict about keys it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value object. Unknown keys are refused, so that a typo is an error and not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

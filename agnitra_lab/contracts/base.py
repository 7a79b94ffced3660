"""What every contract shares: frozen, strict, closed, versioned, and byte-stable JSON."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from agnitra_lab.errors import UsageError


class Contract(BaseModel):
    """Base of all contracts. Unknown keys are errors, fields never change, a missing value is None and never 0."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), ser_json_inf_nan="null"
    )

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return JSON text with the fields in their declared order."""
        return json.dumps(self.model_dump(mode="json"), indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse and validate JSON text.

        Raises:
            UsageError: with the first offending field and what it holds.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UsageError(f"Not a valid {cls.__name__}: {first_problem(error)}.") from error


def first_problem(error: ValidationError) -> str:
    """Describe the first problem of a validation error in one clause, and count the others."""
    problems = error.errors(include_url=False)
    first: Any = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "the top level"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    given = repr(first.get("input"))
    return f"{where}: {first['msg']}, got {given if len(given) <= 80 else given[:77] + '...'}{more}"


# Exact in memory, a plain JSON number on disk: the seeds fix money and hours as numbers.
ExactNumber = Annotated[Decimal, PlainSerializer(float, return_type=float, when_used="json")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=0)]

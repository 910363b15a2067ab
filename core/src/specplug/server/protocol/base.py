"""What all request bodies have in common: strict fields, and unsupported ones refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

_LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = list[Annotated[int, Field(ge=0, le=_LARGEST)]]


class Body(BaseModel):
    """A request body. Fields that it does not have are errors, and numbers are not read from strings.

    Attributes:
        neutral: fields that are accepted with these values alone, with which they change nothing → the values.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name in cls.neutral and not any(_is_same(value, each) for each in (None, *cls.neutral[name])):
                raise PydanticCustomError(
                    "unsupported", "'{name}' is not supported yet; leave it out", {"name": name, "field": name}
                )
        return {name: value for name, value in data.items() if name not in cls.neutral}


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def one_of_forms(expected: str) -> WrapValidator:
    """A validator for a union: one error that says what is expected, instead of one for each of its members."""

    def validate(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise PydanticCustomError("form", "expected {expected}", {"expected": expected}) from error

    return WrapValidator(validate)


class StreamOptions(Body):
    """Options of a stream.

    Attributes:
        include_usage: send the token counts in a last chunk.
        continuous_usage_stats: send them in every chunk.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

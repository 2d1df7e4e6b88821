"""Requests' documents from what a command line says.

Apart from `farpage.cli.session`, which loads all that daemons can be asked for: one that is started needs
none of it.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from farpage.definition.model import Name
from farpage.errors import InvalidInput

Model = TypeVar("Model", bound=BaseModel)


def wanted(model: type[Model], **values: object) -> Model:
    """Make a request's document from command line values.

    :raise InvalidInput: naming the value that the document does not accept.
    """
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "request"
        raise InvalidInput(field, f"{first['input']!r}: {first['msg']}", _hint(first["type"])) from problem


def _hint(kind: str) -> str:
    if kind == "string_pattern_mismatch":
        return "use lower-case letters, digits, '.', '_' and '-', at most 63 of them"
    if kind == "multiple_of":
        return "use a whole number of 4096-byte pages, for example 512M"
    return "correct the value; --help shows an example"


def named(name: str) -> str:
    """Return a name that is fit for a request's path.

    :raise InvalidInput: it is no name.
    """
    return wanted(_Named, name=name).name


class _Named(BaseModel):
    name: Name

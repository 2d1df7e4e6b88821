"""Base of what farpage's own processes tell each other and leave behind for the next ones.

The documents that come from outside are pydantic's, which tells users what is wrong with them. These here
come from farpage itself and are msgspec's: processes that guests wait for load them, in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec


def _plain(value: Any) -> Any:
    """Turn a number of numpy, which a count may be, into Python's."""
    return value.item()


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


def encode(document: object) -> bytes:
    """Return what is made of messages and of the objects that JSON has as JSON."""
    return _ENCODER.encode(document)


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An immutable document; its fields are checked when it is read, not when it is made.

    Its methods are named as those of pydantic's documents.
    """

    @classmethod
    def model_validate(cls, document: object) -> Self:
        """Make it from the objects that JSON has.

        :raise msgspec.ValidationError: they are not such a document.
        """
        return msgspec.convert(document, cls)

    @classmethod
    def model_validate_json(cls, text: bytes) -> Self:
        """Make it from JSON.

        :raise msgspec.DecodeError: the text is not such a document; ValidationError is one of these.
        """
        return msgspec.json.decode(text, type=cls)

    def model_dump_json(self) -> str:
        """Return it as JSON."""
        return encode(self).decode()

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Return a copy with other values in some fields."""
        return msgspec.structs.replace(self, **update)

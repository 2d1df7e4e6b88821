from __future__ import annotations

import os

import msgspec
import pytest

from farpage.blockio import BlockLimits, Feature
from farpage.device.errors import VolumeFenced
from farpage.message import Message, encode
from farpage.nbd import protocol as p
from farpage.nbd.export import ExportInfo
from farpage.nbd.negotiation import Agreed, Enter
from farpage.vios.processes import messages as m


def through(message: object, kind: type[Message]) -> Message:
    """Return a message as the other process gets it."""
    return msgspec.convert(msgspec.json.decode(encode(message)), kind)


def test_an_error_comes_through_in_its_own_words() -> None:
    error = VolumeFenced("v", 1, 2)
    failure = through(m.Failure.of(error), m.Failure)
    assert isinstance(failure, m.Failure)
    raised = failure.error
    assert (raised.code, raised.cause, raised.advice) == (error.code, error.cause, error.advice)
    assert raised.exit_status is error.exit_status
    assert str(raised) == str(error)
    assert vars(raised) == vars(error)


def test_a_negotiation_goes_on_where_it_was() -> None:
    step = Enter(p.NBD_OPT_GO, "v@1", (p.NBD_INFO_PROCESS,))
    agreed = Agreed(structured_replies=True, context_export="v@1", no_zeroes=True, leftover=b"\x00\xff")
    wanted = through(m.Open.of(step, agreed), m.Open)
    assert isinstance(wanted, m.Open)
    assert (wanted.step, wanted.agreed) == (step, agreed)


def test_a_description_comes_through() -> None:
    info = ExportInfo(4096, True, BlockLimits(1, 4096, 65536), Feature.FLUSH | Feature.TRIM, "a volume")
    described = through(m.Described.of(info), m.Described)
    assert isinstance(described, m.Described)
    assert described.info == info


def test_what_is_long_comes_in_a_file() -> None:
    descriptor = m.file_of(m.encoded(m.Claims(wanted={"v": (1, "o")})))
    assert m.Outcome().read(m.Claims, [descriptor]) == m.Claims(wanted={"v": (1, "o")})
    with pytest.raises(OSError):
        os.fstat(descriptor)

from __future__ import annotations

from farpage.device.errors import DeviceUnusable, VolumeFenced, VolumeTaken
from farpage.nbd.errors import ServerRefused
from farpage.vios.names import parse_export_name, refusal_text
from farpage.volume.ownership import Ownership
from farpage.volume.refusal import Refusal, RefusalKind, refusal_of

OWNER = "00000000000000aa"


def test_an_epoch_that_nobody_has_written_under_serves_again() -> None:
    ownership = Ownership(OWNER, 5)
    assert [ownership.raise_above(5), ownership.raise_above(5), ownership.raise_above(6)] == [6, 6, 7]


def test_it_is_fenced_once_and_for_good() -> None:
    ownership, heard = Ownership(OWNER, 5), []
    ownership.when_fenced(lambda: heard.append("one"))
    forget = ownership.when_fenced(lambda: heard.append("two"))
    forget()
    ownership.fence("first")
    ownership.fence("second")
    assert (ownership.fenced, heard) == ("first", ["one"])


def test_a_vios_understands_the_names_that_an_owner_asks_for() -> None:
    lease = "00000000000000ee"
    for owner, wanted_lease in ((OWNER, lease), (OWNER, ""), ("", "")):
        name = parse_export_name(Ownership(owner, 5).export_name("vm1", 6, wanted_lease))
        assert (name.volume, name.epoch, name.owner, name.lease) == ("vm1", 6, owner, wanted_lease)


def test_an_owner_says_where_a_volume_on_the_move_comes_from() -> None:
    name = parse_export_name(Ownership(OWNER, 5).export_name("vm1", 6, "", "d1", "d2"))
    assert (name.device, name.source, name.epoch, name.owner) == ("d1", "d2", 6, OWNER)


def _refused(text: str) -> ServerRefused:
    return ServerRefused("vm1@5", "unix:/v", text, "NBD_REP_ERR_POLICY")


def test_an_owner_understands_why_a_vios_refuses() -> None:
    taken, older = VolumeTaken("vm1", 5, 7), VolumeFenced("vm1", 5, 6)
    assert refusal_of(_refused(refusal_text(taken))) == Refusal(RefusalKind.ANOTHER_OWNER, 7, taken.cause)
    assert refusal_of(_refused(refusal_text(older))) == Refusal(RefusalKind.STALE_EPOCH, 6, older.cause)


def test_other_refusals_say_nothing_about_ownership() -> None:
    assert refusal_of(_refused(refusal_text(DeviceUnusable("dir:/d", "gone", "")))) is None
    assert refusal_of(OSError("another_owner 7: no")) is None

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from farpage.errors import InvalidInput
from farpage.vios.names import ExportName, parse_export_name


def test_an_owner_names_volume_and_epoch() -> None:
    assert parse_export_name("vm1@7") == ExportName("vm1", 7)


def test_an_owner_may_name_its_claim_and_its_lease_too() -> None:
    owner, lease = "00000000000000aa", "00000000000000ee"
    assert parse_export_name(f"vm1@7:{owner}") == ExportName("vm1", 7, owner)
    assert parse_export_name(f"vm1@7:{owner}:{lease}") == ExportName("vm1", 7, owner, lease)


def test_a_name_may_say_which_device_the_replica_is_on() -> None:
    device, owner = "9ebffa09-bce1-473f-badc-f9a816dadf33", "00000000000000aa"
    assert parse_export_name(f"vm1/{device}@7:{owner}") == ExportName("vm1", 7, owner, device=device)
    assert parse_export_name(f"vm1/{device}") == ExportName("vm1", None, device=device)


DEVICE, SOURCE = "9ebffa09-bce1-473f-badc-f9a816dadf33", "00000000-0000-0000-0000-0000000000d2"
OWNER, LEASE, PRINCIPAL = "00000000000000aa", "00000000000000ee", "00000000000000cc"


def test_the_owner_of_a_volume_on_the_move_names_where_it_comes_from() -> None:
    wanted = ExportName("vm1", 7, OWNER, LEASE, device=DEVICE, source=SOURCE)
    assert parse_export_name(f"vm1/{DEVICE}<{SOURCE}@7:{OWNER}:{LEASE}") == wanted


def test_an_intermediate_client_adds_its_token() -> None:
    assert parse_export_name(f"vm1/{SOURCE}+{PRINCIPAL}") == ExportName(
        "vm1", None, device=SOURCE, principal=PRINCIPAL
    )
    assert parse_export_name(f"vm1/{DEVICE}<{SOURCE}+{PRINCIPAL}") == ExportName(
        "vm1", None, device=DEVICE, source=SOURCE, principal=PRINCIPAL
    )
    assert parse_export_name(f"vm1/{SOURCE}@7:{OWNER}+{PRINCIPAL}") == ExportName(
        "vm1", 7, OWNER, device=SOURCE, principal=PRINCIPAL
    )


def test_without_an_epoch_it_is_a_read_only_view() -> None:
    assert parse_export_name("vm1") == ExportName("vm1", None)


@pytest.mark.parametrize(
    "text",
    [
        "", "@1", "vm1@", "vm1@0", "vm1@01", "vm1@-1", "vm1@1.0", "vm1@1@2", "vm1@x", "VM1@1", "../vm1@1",
        "vm1/../vm2", "vm1 @1", "vm1@1\n", "vm1\0@1", "vm1@9007199254740992", "vm1@" + "9" * 4000,
        "vm1@٣", "a" * 64 + "@1", "vm1:00000000000000aa", "vm1@1:", "vm1@1:aa", "vm1@1:00000000000000AA",
        "vm1<a@1", "vm1/a<@1", "vm1/a<b<c@1", "vm1+", "vm1+aa", "vm1+00000000000000CC",
        "vm1+00000000000000cc@1", "vm1@1:00000000000000aa:", "vm1@1:00000000000000aa:00000000000000bb:",
    ],
)  # fmt: skip
def test_what_is_no_export_name_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(InvalidInput, match="VOLUME@EPOCH"):
        parse_export_name(text)


@given(st.text(max_size=80))
@example(f"vm1/{DEVICE}<{SOURCE}@7:{OWNER}:{LEASE}+{PRINCIPAL}")
@example(f"vm1/{DEVICE}<{SOURCE}+{PRINCIPAL}")
def test_any_text_is_parsed_to_what_writes_it_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert str(parse_export_name(text)) == text

from __future__ import annotations

from pathlib import Path

import pytest

from farpage.embedded.layout import NoSet, NoSuchVios, StateLayout, default_state_dir
from farpage.errors import ExitStatus, InvalidInput


def test_what_was_written_is_read(tmp_path: Path) -> None:
    layout = StateLayout.at(Path("/tmp/s"))
    document = layout.describe(("vios1", "vios2"))
    assert document.vioses["vios2"].control == "unix:/tmp/s/vios/vios2/control.sock"
    assert document.hypervisor.attach == "unix:/tmp/s/hypervisor/attach.sock"
    here = StateLayout.at(tmp_path / "new")
    here.create_root()
    here.create(document)
    assert here.read() == document
    assert (here.root.stat().st_mode & 0o777, here.vios_dir("vios2").is_dir()) == (0o700, True)


def test_a_folder_without_a_set_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(NoSet) as caught:
        StateLayout.at(tmp_path).read()
    assert caught.value.exit_status is ExitStatus.UNREACHABLE
    assert f"farpage up --state {tmp_path}" in caught.value.advice


def test_a_broken_description_names_the_file_and_the_field(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text('{"format": 1, "vioses": {}}')
    with pytest.raises(InvalidInput) as caught:
        StateLayout.at(tmp_path).read()
    assert "set.json" in caught.value.field
    assert "hypervisor" in caught.value.problem


def test_a_path_too_long_for_sockets_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        StateLayout.at(tmp_path / ("x" * 120)).describe(("vios1",))
    assert caught.value.field == "state folder"


def test_an_unknown_vios_is_refused_with_the_known_ones() -> None:
    document = StateLayout.at(Path("/tmp/s")).describe(("vios1", "vios2"))
    with pytest.raises(NoSuchVios) as caught:
        document.vios("vios3")
    assert "vios1, vios2" in caught.value.advice


def test_the_environment_names_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARPAGE_STATE", "/elsewhere")
    assert default_state_dir() == Path("/elsewhere")


def test_users_have_a_default_folder_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARPAGE_STATE", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/state")
    assert default_state_dir() == Path("/home/me/state/farpage")

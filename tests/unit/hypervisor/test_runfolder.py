"""The run folder: what one control process stores, the next one reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from farpage.attach.memory import ClientKind
from farpage.hypervisor.runfolder import RunFolder, RunFolderInUse
from farpage.kernel.process import ProcessIdentity
from farpage.pager.attachmentrecord import AttachmentRecord

RECORD = AttachmentRecord(
    client="vm",
    kind=ClientKind.PROCESS,
    process=ProcessIdentity(pid=7, started_ticks=123, boot="b"),
    uffds_before=(3, 9),
    qmp="/run/qmp.sock",
)


def test_records_are_found_by_the_next_control_process(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.save(RECORD)
    first.save(RECORD.model_copy(update={"client": "other", "made_for_it": True}))
    first.save(RECORD.model_copy(update={"guest_paused": True}))
    first.close()
    second = RunFolder(tmp_path / "run")
    assert second.records() == [
        RECORD.model_copy(update={"client": "other", "made_for_it": True}),
        RECORD.model_copy(update={"guest_paused": True}),
    ]
    second.close()


def test_a_client_is_forgotten_with_its_state_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(RECORD)
    folder.state_path("vm").write_bytes(b"table")
    folder.remove("vm")
    folder.remove("vm")
    assert folder.records() == []
    assert not folder.state_path("vm").exists()
    folder.close()


def test_one_control_process_has_the_folder_at_a_time(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    with pytest.raises(RunFolderInUse, match=str(tmp_path)):
        RunFolder(tmp_path)
    first.close()
    RunFolder(tmp_path).close()


def test_a_record_that_cannot_be_read_is_left_where_it_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(RECORD)
    damaged = tmp_path / "clients" / "bad.json"
    damaged.write_text('{"client": 5}')
    assert folder.records() == [RECORD]
    assert damaged.exists()
    folder.close()


def test_the_folder_is_for_its_user_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert [path.stat().st_mode & 0o777 for path in (folder.path, folder.workers)] == [0o700, 0o700]
    folder.close()

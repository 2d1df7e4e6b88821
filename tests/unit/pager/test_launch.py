"""Data workers that are started before anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farpage.errors import InvalidInput
from farpage.pager import launch
from farpage.pager.launch import LaunchedWorker, launch_missing, worker_count, workers_folder


def test_as_many_are_started_as_no_running_process_has_a_socket_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def note(folder: Path) -> LaunchedWorker:
        started.append(folder)
        return LaunchedWorker.__new__(LaunchedWorker)

    monkeypatch.setattr(launch, "launch", note)
    folder = workers_folder(tmp_path)
    assert len(launch_missing(folder, 2)) == 2
    (folder / f"{os.getpid()}.sock").touch()
    (folder / "0.sock").touch()
    assert len(launch_missing(folder, 2)) == 1
    assert launch_missing(folder, 1) == []
    assert set(started) == {folder}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="--run-dir"):
        launch_missing(workers_folder(tmp_path / "file"), 1)


def test_one_for_each_processor_when_nobody_says() -> None:
    assert (worker_count(None), worker_count(3)) == (len(os.sched_getaffinity(0)), 3)
    assert (worker_count(None, {4, 5}), worker_count(3, {4, 5})) == (2, 3)

from __future__ import annotations

from pathlib import Path

from farpage.embedded.child import Child


async def test_a_process_that_has_just_ended_is_started_anew(tmp_path: Path) -> None:
    """Also in the turn of the loop in which its watcher has not heard of the end yet."""
    told: list[str] = []
    child = Child("daemon", ["--version"], tmp_path / "log", lambda event: told.append(event.message))
    await child.start()
    first, watcher = child.pid, child._watcher
    assert watcher is not None
    watcher.cancel()
    await child.exited()
    await child.start()
    assert child.pid not in (None, first)
    await child.exited()
    await child.stop(10)
    assert told == [
        f"started, pid {first}",
        "exited with status 0",
        told[2],
        "exited with status 0",
    ]

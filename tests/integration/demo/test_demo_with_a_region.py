"""The whole demo, small, with a Region in place of a virtual machine."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from farpage.demo.guests import RegionGuest
from farpage.demo.run import Demo, DemoSettings
from farpage.demo.verdict import Verdict
from farpage.demo.view import LineView

MIB = 1 << 20


async def test_the_guest_verifies_everything_through_a_kill_and_a_hang() -> None:
    log = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="fpdemo-", dir="/tmp") as folder:
        settings = DemoSettings(
            folder=Path(folder),
            make_guest=RegionGuest,
            memory_bytes=40 * MIB,
            fill_bytes=24 * MIB,
            limit_bytes=10 * MIB,
        )
        result = await Demo(settings, LineView(log)).run()
    assert result.problems == (), log.getvalue()
    assert result.verdict is Verdict.OK
    assert (result.pages_total, result.pages_wrong) == (6144, 0)
    assert result.page_ins > 6144
    assert result.page_outs > 3072
    assert [failover.kind for failover in result.failovers] == ["sigkill", "sigstop"]
    assert result.failovers[0].vios != result.failovers[1].vios

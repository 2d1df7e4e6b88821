"""Three minutes of the campaign; by hand it runs for longer, and its times count: see docs/reliability.md."""

from __future__ import annotations

import pytest

from tests.faults.campaign.report import describe, longest_stall
from tests.faults.campaign.run import CampaignOptions, run_campaign
from tests.faults.campaign.schedule import Kind

SECONDS = 165.0
LOOSE_SECONDS = 30.0
"""What a busy machine may make of a stall that is far below a second on a quiet one."""


@pytest.mark.timeout(600)
async def test_three_minutes_of_faults_lose_nothing_hang_nothing_and_leak_nothing() -> None:
    outcome = await run_campaign(CampaignOptions(seed=20, seconds=SECONDS), print)
    text = describe(outcome)
    print(text)
    assert not outcome.failed, text
    assert outcome.reads > 10_000
    assert len(outcome.faults) >= len(Kind)
    for fault in outcome.faults:
        if fault.alone:
            assert longest_stall(fault, outcome.stalls) < fault.hold_seconds + LOOSE_SECONDS, fault

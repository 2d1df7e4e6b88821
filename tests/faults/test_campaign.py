"""A campaign of all kinds of faults; by hand it runs longer, and its times count: docs/reliability.md."""

from __future__ import annotations

import pytest

from tests.faults.campaign.report import describe, longest_stall
from tests.faults.campaign.run import CampaignOptions, run_campaign
from tests.faults.campaign.schedule import Kind

FAULTS = 24
"""More than a bag of them: each kind comes once or more often, however busy the machine is."""
SECONDS = 1000.0
LOOSE_SECONDS = 30.0
"""What a busy machine may make of a stall that is far below a second on a quiet one."""


@pytest.mark.timeout(1200)
async def test_a_campaign_of_faults_loses_nothing_hangs_nothing_and_leaks_nothing() -> None:
    outcome = await run_campaign(CampaignOptions(seed=20, seconds=SECONDS, faults=FAULTS), print)
    text = describe(outcome)
    print(text)
    assert not outcome.failed, text
    assert outcome.reads > 10_000
    assert len(outcome.faults) == FAULTS
    # Others need root.
    assert {fault.kind for fault in outcome.faults} >= set(Kind) - {Kind.LINK_CUT, Kind.DEVICE_FULL}
    for fault in outcome.faults:
        if fault.alone:
            assert longest_stall(fault, outcome.stalls) < fault.hold_seconds + LOOSE_SECONDS, fault

from __future__ import annotations

from farpage.volume.failover import Failover, FailoverLog


def test_a_stall_is_charged_to_the_failover_that_it_overlaps() -> None:
    log = FailoverLog()
    before = Failover("vios1", "killed", detected_at_seconds=10.0, active_at_seconds=10.1)
    now = Failover("vios2", "hung", detected_at_seconds=20.0)
    log.records.extend([before, now])
    log.note_stall(19.0, 20.5)
    assert before.longest_stall_seconds == 0.0
    assert now.longest_stall_seconds == 1.5


def test_a_wait_that_ended_before_the_loss_is_not_charged() -> None:
    log = FailoverLog()
    record = Failover("vios1", "killed", detected_at_seconds=10.0, active_at_seconds=10.1)
    log.records.append(record)
    log.note_stall(9.0, 9.9)
    log.note_stall(10.2, 10.9)
    assert record.longest_stall_seconds == 0.0

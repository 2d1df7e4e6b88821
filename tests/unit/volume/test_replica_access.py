"""What a pager sees of a volume's replicas: reading one, putting one right, and what it waits for."""

from __future__ import annotations

import errno

from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import PAGE, Rig


def test_a_write_waits_for_the_repair_of_its_page() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.volume.open(5)
        vios = rig.vioses[rig.volume.status()[0].endpoint.vios]
        vios.hang()
        repaired: list[int] = []
        rig.volume.rewrite_replica("disk-1", PAGE, memoryview(b"r" * PAGE), repaired.append)
        written, other = rig.write(1, ord("w")), rig.write(2, ord("o"))
        assert len(vios.backlog) == 2
        vios.resume()
        await rig.until(lambda: bool(written and other))
        assert (repaired, written, other) == ([0], [0], [0])
        assert bytes(rig.disk.content[PAGE : PAGE + 1]) == b"w"
        await rig.volume.close()

    run_simulated(main)


def test_a_device_that_holds_no_replica_is_not_read_or_rewritten() -> None:
    async def main() -> None:
        rig = Rig()
        await rig.volume.open(5)
        errors: list[int] = []
        rig.volume.read_replica("other", 0, PAGE, lambda error, _: errors.append(error))
        rig.volume.rewrite_replica("other", 0, memoryview(bytes(PAGE)), errors.append)
        assert errors == [errno.ESTALE, errno.ESTALE]
        assert rig.volume.replicas == ("disk-1",)
        await rig.volume.close()

    run_simulated(main)


def test_a_full_device_is_told_until_a_write_succeeds_again() -> None:
    async def main() -> None:
        rig = Rig(paths=1)
        told: list[bool] = []
        rig.volume.on_full = told.append
        await rig.volume.open(5)
        rig.vioses["vios1"].error = errno.ENOSPC
        written = rig.write(1, 7)
        await rig.until(lambda: bool(told))
        assert (told, written) == ([True], [])
        rig.vioses["vios1"].error = 0
        await rig.until(lambda: bool(written))
        assert told == [True, False]
        await rig.volume.close()

    run_simulated(main)


def test_the_loss_of_the_last_path_is_told_until_one_is_back() -> None:
    async def main() -> None:
        rig = Rig(paths=1)
        told: list[bool] = []
        await rig.volume.open(5)
        rig.volume.on_no_path = told.append
        rig.vioses["vios1"].kill()
        assert told == [True]
        rig.vioses["vios1"].up = True
        await rig.until(lambda: len(told) == 2)
        assert told == [True, False]
        await rig.volume.close()

    run_simulated(main)

"""The hypervisor's definition and its copies at real VIOS: which is followed, which is repaired."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from farpage.definition import rules
from farpage.definition.copy import DefinitionCopy
from farpage.definition.model import (
    PAGE_BYTES,
    ClientRecord,
    Definition,
    PagingCommand,
    Replica,
    ReplicaState,
    ViosRecord,
    VolumeRecord,
)
from farpage.errors import FarpageError
from farpage.hypervisor.definitions import CopyUnknown, DefinitionKeeper, DefinitionUnproven, NoVios
from farpage.hypervisor.vioses import Vios
from tests.support.vios import ViosProcess, vios_processes


class Rig:
    """Two VIOS and one keeper after the other, as of a hypervisor that is restarted."""

    def __init__(self, folder: Path, processes: tuple[ViosProcess, ...]) -> None:
        self.folder = folder
        self.one, self.two = processes
        self.alarms: list[tuple[str, str]] = []

    @property
    def own(self) -> Path:
        return self.folder / "definition.json"

    @property
    def attempted(self) -> Path:
        return self.folder / "attempted.json"

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.alarms]

    @asynccontextmanager
    async def hypervisor(self, *names: str) -> AsyncIterator[DefinitionKeeper]:
        """Start a keeper that knows some of the VIOS (all when none is named)."""
        self.alarms = []
        processes = [process for process in (self.one, self.two) if not names or process.name in names]
        vioses = {process.name: Vios(process.name, process.control) for process in processes}
        keeper = DefinitionKeeper(
            vioses,
            DefinitionCopy(self.own),
            DefinitionCopy(self.attempted),
            lambda kind, message: self.alarms.append((kind, message)),
            hypervisor="host",
        )
        try:
            await asyncio.gather(*(vios.ask() for vios in vioses.values()))
            await keeper.start()
            self.vioses = vioses
            yield keeper
        finally:
            for vios in vioses.values():
                await vios.client.close()

    async def back(self, keeper: DefinitionKeeper, process: ViosProcess) -> None:
        """Start a VIOS, and have the keeper notice."""
        process.start()
        assert await self.vioses[process.name].ask()
        await keeper.repair(self.vioses[process.name])

    async def stored(self, process: ViosProcess) -> Definition:
        async with process.client() as client:
            return await client.get("/v1/definition", Definition)

    async def store(self, process: ViosProcess, definition: Definition) -> None:
        """Put a definition into a VIOS behind the keeper's back."""
        before = await self.stored(process)
        async with process.client() as client:
            params = {"expected_revision": before.revision}
            await client.put("/v1/definition", definition, Definition, params=params)

    def with_both(self, definition: Definition) -> Definition:
        """Enter the two VIOS."""
        for process in (self.one, self.two):
            record = ViosRecord(control=process.control, data=(str(process.data),))
            definition = rules.register_vios(definition, process.name, record, [])
        return definition


def with_vios(definition: Definition, name: str, control: str = "unix:/nowhere") -> Definition:
    """Change a definition: enter a VIOS that does not exist."""
    return rules.register_vios(definition, name, ViosRecord(control=control, data=("unix:/nowhere",)), [])


def with_client(definition: Definition, hypervisor: str) -> Definition:
    """Change a definition: enter a hypervisor's client, and a VIOS with its volume that cannot be reached."""
    device = "11111111-2222-4333-8444-555555555555"
    found = rules.FoundDevice(device, "far", "dir", "dir:/far", 1 << 30, tuple(PagingCommand))
    record = ViosRecord(control="tcp:192.0.2.1:1", data=("tcp:192.0.2.1:2",))
    definition = rules.register_vios(definition, "far", record, [found])
    replicas = (Replica(device=device, state=ReplicaState.IN_SYNC),)
    volume = VolumeRecord(name="vm1", size_bytes=PAGE_BYTES, replicas=replicas)
    client = ClientRecord(memory_bytes=PAGE_BYTES, hypervisor=hypervisor, volumes=(volume,))
    return rules.next_revision(definition, clients={"vm1": client})


def with_client_at(definition: Definition, vios: str) -> Definition:
    """Change a definition: make a client on a device that a VIOS does not have."""
    device = "11111111-2222-4333-8444-555555555555"
    found = rules.FoundDevice(device, "disk", "dir", "dir:/d", 1 << 30, tuple(PagingCommand))
    definition = rules.register_vios(definition, vios, definition.vioses[vios], [found])
    return rules.add_client(definition, "vm1", memory_bytes=8192, hypervisor="host")


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="fpkeep-", dir="/tmp") as name:
        folder = Path(name)
        with vios_processes(
            folder, "vios1", "vios2", devices=[f"dir:{folder / 'disk'}?size=1G"]
        ) as processes:
            yield Rig(folder, processes)


async def test_a_change_is_stored_at_every_vios_and_in_a_copy_of_the_hypervisors_own(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        changed = await keeper.change(rig.with_both)
        assert changed.revision == 2
        assert await rig.stored(rig.one) == await rig.stored(rig.two) == changed
        assert DefinitionCopy(rig.own).load() == changed
        assert rig.alarms == []


async def test_a_vios_that_missed_a_change_is_repaired_when_it_is_back(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        rig.two.kill()
        await rig.vioses["vios2"].ask()
        assert not keeper.missed.is_set()
        changed = await keeper.change(lambda now: with_vios(now, "new"))
        assert keeper.missed.is_set()
        await rig.back(keeper, rig.two)
        assert await rig.stored(rig.two) == changed
        assert keeper.repairs == {"vios2": 1}
        ((kind, message),) = rig.alarms
        assert (kind, "vioses[new]: added" in message) == ("definition_repaired", True)


async def test_a_change_waits_no_longer_for_a_vios_that_hangs_when_that_is_doubted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farpage.hypervisor.vioses.TIMEOUT_SECONDS", 600)
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        rig.two.signal(signal.SIGSTOP)
        change = asyncio.create_task(keeper.change(lambda now: with_vios(now, "new")))
        while await rig.stored(rig.one) == keeper.current:
            assert not change.done()
        await rig.vioses["vios2"].doubt()
        async with asyncio.timeout(60):
            changed = await change
        assert keeper.missed.is_set()
        assert not rig.vioses["vios2"].reachable
        assert DefinitionCopy(rig.own).load() == await rig.stored(rig.one) == changed
        rig.two.signal(signal.SIGCONT)
        assert await rig.vioses["vios2"].ask()
        await keeper.repair(rig.vioses["vios2"])
        assert await rig.stored(rig.two) == changed


async def test_a_vios_that_is_doubted_but_answers_is_not_left_out(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farpage.hypervisor.vioses.DOUBTED_SECONDS", 60)
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        await rig.vioses["vios2"].doubt()
        changed = await keeper.change(lambda now: with_vios(now, "new"))
        assert await rig.stored(rig.two) == changed
        assert not keeper.missed.is_set()


class Puts:
    """Counts what a VIOS is asked to store."""

    def __init__(self, vios: Vios, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.first = asyncio.Event()
        self._put = vios.put_definition
        monkeypatch.setattr(vios, "put_definition", self.put)

    async def put(self, expected_revision: int, definition: Definition) -> None:
        self.count += 1
        self.first.set()
        await self._put(expected_revision, definition)


async def test_changes_that_come_together_or_while_one_is_stored_are_stored_together(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        puts = Puts(rig.vioses["vios2"], monkeypatch)
        changes = [asyncio.create_task(keeper.change(partial(with_vios, name=name))) for name in "abcdef"]
        await puts.first.wait()
        changes += [asyncio.create_task(keeper.change(partial(with_vios, name=name))) for name in "ghijkl"]
        found = await asyncio.gather(*changes)
        assert puts.count == 2
        assert [len(definition.vioses) for definition in found] == list(range(3, 15))
        assert await rig.stored(rig.one) == await rig.stored(rig.two) == keeper.current == found[-1]


async def test_a_change_that_is_refused_leaves_those_alone_that_are_stored_with_it(rig: Rig) -> None:
    def refuse(_: Definition) -> Definition:
        raise CopyUnknown("vios3", "refused")

    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        first, second, last = (partial(with_vios, name=name) for name in "abc")
        changes = [keeper.change(edit) for edit in (first, second, refuse, last)]
        *_, refused, made = await asyncio.gather(*changes, return_exceptions=True)
        assert isinstance(refused, CopyUnknown)
        assert made == keeper.current == await rig.stored(rig.two)
        assert {"a", "b", "c"} <= keeper.current.vioses.keys()
        revision = keeper.current.revision
        with pytest.raises(CopyUnknown):
            await keeper.change(refuse)
        assert keeper.current.revision == revision


async def test_a_change_that_is_given_up_leaves_those_alone_that_are_stored_with_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        for given_up in range(3):
            puts = Puts(rig.vioses["vios1"], monkeypatch)
            names = [f"{given_up}{number}" for number in range(3)]
            changes = [asyncio.create_task(keeper.change(partial(with_vios, name=name))) for name in names]
            await puts.first.wait()
            changes[given_up].cancel()
            await asyncio.gather(*changes, return_exceptions=True)
            assert [change.cancelled() for change in changes] == [n == given_up for n in range(3)]
            del names[given_up]
            assert (await rig.stored(rig.two)).vioses.keys() >= set(names)


async def make_vios2_lag(rig: Rig) -> Definition:
    """Make a change that vios2 misses; return it. Only vios2 runs then, with the definition before."""
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        rig.two.kill()
        await rig.vioses["vios2"].ask()
        changed = await keeper.change(lambda now: with_vios(now, "vios1", rig.one.control + "2"))
        rig.one.kill()
    rig.two.start()
    return changed


async def test_after_a_restart_a_lagging_copy_is_not_followed_although_it_is_the_only_one(rig: Rig) -> None:
    changed = await make_vios2_lag(rig)
    async with rig.hypervisor() as keeper:
        assert keeper.current == changed
        assert await rig.stored(rig.two) == changed
        assert rig.kinds == ["definition_repaired"]
        assert (await keeper.change(lambda now: with_vios(now, "new"))).revision == changed.revision + 1


async def test_without_an_own_copy_nothing_is_changed_until_every_vios_has_answered(rig: Rig) -> None:
    changed = await make_vios2_lag(rig)
    rig.own.unlink()
    before = await rig.stored(rig.two)
    async with rig.hypervisor() as keeper:
        with pytest.raises(DefinitionUnproven, match="VIOS vios1 does not tell") as caught:
            await keeper.change(lambda now: with_vios(now, "new"))
        assert "promote" in caught.value.advice
        assert rig.kinds == ["definition_unproven"]
        await keeper.load()
        assert rig.kinds == ["definition_unproven"]
        assert await rig.stored(rig.two) == before
        assert not rig.own.exists()
        await rig.back(keeper, rig.one)
        assert keeper.unproven is None
        assert keeper.current == await rig.stored(rig.two) == DefinitionCopy(rig.own).load() == changed


async def test_at_a_first_start_with_a_vios_away_nothing_is_changed_until_it_has_answered(rig: Rig) -> None:
    rig.two.kill()
    async with rig.hypervisor() as keeper:
        with pytest.raises(DefinitionUnproven, match="revision 0"):
            await keeper.change(rig.with_both)
        await rig.back(keeper, rig.two)
        assert (await keeper.change(rig.with_both)).revision == 2


async def test_a_vios_that_a_copy_names_is_asked_although_the_hypervisor_was_not_told_of_it(rig: Rig) -> None:
    changed = rig.with_both(Definition())
    newer = with_vios(changed, "new", rig.one.control)
    await rig.store(rig.one, changed)
    await rig.store(rig.two, newer)
    async with rig.hypervisor("vios1") as keeper:
        assert keeper.current == newer
        assert await rig.stored(rig.one) == newer
    await rig.store(rig.one, with_client(newer, "host"))
    rig.own.unlink()
    rig.two.kill()
    async with rig.hypervisor("vios1") as keeper:
        assert sorted(keeper.missing) == ["far", "vios2"]


async def test_a_new_hypervisor_need_not_reach_each_vios_that_a_copy_names(rig: Rig) -> None:
    others = with_client(rig.with_both(Definition()), "other")
    await rig.store(rig.one, others)
    rig.two.kill()
    async with rig.hypervisor("vios1") as keeper:
        assert keeper.unproven is None
        changed = await keeper.change(lambda now: with_vios(now, "new"))
        assert (changed.revision, rig.kinds) == (others.revision + 1, [])
        assert await rig.stored(rig.one) == changed


async def test_a_newer_definition_that_somebody_else_has_made_is_followed(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(rig.with_both)
        foreign = with_vios(with_vios(base, "new"), "newer")
        await rig.store(rig.two, foreign)
        await keeper.repair(rig.vioses["vios2"])
        assert keeper.current == await rig.stored(rig.one) == DefinitionCopy(rig.own).load() == foreign
        assert rig.kinds == ["definition_followed", "definition_repaired"]


async def test_a_copy_that_contradicts_is_replaced_and_told_of(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(rig.with_both)
        both = [with_vios(base, "aaa"), with_vios(base, "zzz")]
        await rig.store(rig.one, both[0])
        await rig.store(rig.two, both[1])
        await keeper.load()
        assert keeper.current in both
        assert await rig.stored(rig.one) == await rig.stored(rig.two) == keeper.current
        assert rig.kinds == ["definition_followed", "definition_contradiction"]


async def test_a_change_is_repeated_on_a_newer_definition_that_one_vios_turns_out_to_have(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(rig.with_both)
        foreign = with_vios(with_vios(with_vios(base, "a"), "b"), "c")
        await rig.store(rig.two, foreign)
        changed = await keeper.change(lambda now: with_vios(now, "mine"))
        assert {"a", "b", "c", "mine"} <= changed.vioses.keys()
        assert await rig.stored(rig.one) == await rig.stored(rig.two) == changed


async def test_a_damaged_own_copy_is_not_used_and_is_told_of(rig: Rig) -> None:
    changed = await make_vios2_lag(rig)
    rig.own.write_text("{")
    async with rig.hypervisor() as keeper:
        assert rig.kinds == ["definition_copy_failed", "definition_unproven"]
        await rig.back(keeper, rig.one)
        assert keeper.current == DefinitionCopy(rig.own).load() == changed


async def test_an_own_copy_that_cannot_be_written_is_not_left_behind_as_an_old_one(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        assert rig.own.exists()
        # The file that the next version is written to: a folder cannot be opened for it.
        rig.own.with_suffix(".new").mkdir()
        await keeper.change(lambda now: with_vios(now, "new"))
        assert not rig.own.exists()
        assert rig.kinds == ["definition_copy_failed"]
        rig.own.with_suffix(".new").rmdir()
        changed = await keeper.change(lambda now: with_vios(now, "newer"))
        assert DefinitionCopy(rig.own).load() == changed


async def test_a_change_that_no_vios_can_take_has_them_asked_at_once_and_leaves_no_note(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        noted = DefinitionCopy(rig.attempted).load()
        for vios in rig.vioses.values():
            vios.problem = "cut off"
        assert not keeper.missed.is_set()
        with pytest.raises(NoVios, match="cut off"):
            await keeper.change(lambda now: with_vios(now, "lost"))
        assert keeper.missed.is_set()
        assert DefinitionCopy(rig.attempted).load() == noted


async def test_no_own_copy_is_kept_while_a_change_of_which_there_is_no_note_may_be_stored(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        rig.attempted.with_suffix(".new").mkdir()  # the note cannot be written
        for vios in (rig.one, rig.two):
            vios.kill()
        with pytest.raises(NoVios):
            await keeper.change(lambda now: with_vios(now, "lost"))
        assert rig.kinds == ["definition_copy_failed"]
        await asyncio.gather(*(vios.ask() for vios in rig.vioses.values()))
        for vios in (rig.one, rig.two):
            await rig.back(keeper, vios)
        assert not rig.own.exists()
    rig.two.kill()  # which may have it
    async with rig.hypervisor() as keeper:
        assert keeper.unproven
        await rig.back(keeper, rig.two)
        assert not keeper.unproven
        changed = await keeper.change(lambda now: with_vios(now, "new"))
        assert DefinitionCopy(rig.own).load() == changed


async def test_an_edit_that_is_refused_changes_no_copy(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(rig.with_both)
        with pytest.raises(FarpageError, match="not in the definition"):
            await keeper.change(lambda now: rules.remove_client(now, "ghost"))
        assert keeper.current == await rig.stored(rig.one) == DefinitionCopy(rig.own).load() == base


async def test_a_copy_is_promoted_only_by_force_and_says_what_is_lost(rig: Rig) -> None:
    await make_vios2_lag(rig)
    rig.own.unlink()
    before = await rig.stored(rig.two)
    async with rig.hypervisor() as keeper:
        preview = await keeper.promote("vios2", [], [], force=False)
        assert (preview.done, preview.lost, list(preview.missing)) == (False, (), ["vios1"])
        assert keeper.unproven is not None
        assert await rig.stored(rig.two) == before
        done = await keeper.promote("vios2", [], [], force=True)
        assert done.done
        assert keeper.unproven is None
        assert keeper.current.revision == done.revision > before.revision
        assert keeper.current == await rig.stored(rig.two) == DefinitionCopy(rig.own).load()
        assert "definition_promoted" in rig.kinds
        changed = await keeper.change(lambda now: with_vios(now, "new"))
        # The one that was given up comes back with a change that nobody else had: it is replaced.
        await rig.back(keeper, rig.one)
        assert await rig.stored(rig.one) == keeper.current == changed


async def test_promoting_an_older_copy_names_the_known_changes_that_are_lost(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(rig.with_both)
        rig.two.kill()
        await rig.vioses["vios2"].ask()
        await keeper.change(lambda now: with_vios(now, "new"))
        rig.two.start()
        preview = await keeper.promote("vios2", [], [], force=False)
        assert (preview.copy_revision, preview.lost) == (base.revision, ("vioses[new]: removed",))
        await keeper.promote("vios2", [], [], force=True)
        assert "new" not in (await rig.stored(rig.one)).vioses


async def test_a_copy_that_is_not_known_is_not_promoted(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        await keeper.change(rig.with_both)
        rig.two.kill()
        for vios in ("vios2", "ghost"):
            with pytest.raises(CopyUnknown):
                await keeper.promote(vios, [], [], force=True)


async def test_a_change_that_nobody_acknowledged_is_not_followed_past_a_later_one(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(rig.with_both)
    # A hypervisor that was killed when only the second VIOS had its change, of all that sort behind the next.
    attempted = with_vios(with_vios(base, "zzz"), "zzzz")
    DefinitionCopy(rig.attempted).save(attempted)
    await rig.store(rig.two, attempted)
    rig.two.kill()
    async with rig.hypervisor() as keeper:
        changed = await keeper.change(lambda now: with_vios(now, "mine"))
        await rig.back(keeper, rig.two)
        assert await rig.stored(rig.two) == keeper.current == changed


async def test_a_change_back_to_what_was_acknowledged_is_stored_past_one_that_nobody_acknowledged(
    rig: Rig,
) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(rig.with_both)
    attempted = with_vios(base, "zzz")
    DefinitionCopy(rig.attempted).save(attempted)
    await rig.store(rig.two, attempted)
    rig.two.kill()
    async with rig.hypervisor() as keeper:
        assert keeper.current == base
        changed = await keeper.change(lambda now: now)
        await rig.back(keeper, rig.two)
        assert await rig.stored(rig.two) == keeper.current == changed
        assert "zzz" not in changed.vioses
        assert await keeper.change(lambda now: now) is keeper.current


async def test_a_promoted_copy_stays_when_a_later_owners_comes_to_light(rig: Rig) -> None:
    async with rig.hypervisor() as keeper:
        base = await keeper.change(lambda now: with_client_at(rig.with_both(now), "vios1"))
    later = rules.claim(base, "vm1", "b" * 16, "elsewhere", at_least=1 << 40)
    await rig.store(rig.two, later)
    rig.two.kill()
    rig.own.unlink()
    async with rig.hypervisor() as keeper:
        await keeper.promote("vios1", [], [], force=True)
        promoted = keeper.current
        await rig.back(keeper, rig.two)
        assert await rig.stored(rig.two) == keeper.current == promoted

"""The commands against real daemons."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from farpage.definition.model import PAGE_BYTES, Definition
from farpage.embedded.control import VIOS_READ_SECONDS
from farpage.errors import ExitStatus
from farpage.hypervisor.model import ClientInfo, HypervisorInfo, PathInfo, PoolInfo, ScrubInfo, ViosStatus
from farpage.kernel.affinity import format_cpus, own_cpus
from tests.support.running_set import Answer, Farpage, RunningSet, eventually, wrong_pages


def test_up_describes_the_set_that_it_started(running_set: RunningSet) -> None:
    assert json.loads((running_set.state / "set.json").read_text()) == running_set.document
    assert set(running_set.document["vioses"]) == {"vios1", "vios2"}


def test_the_daemons_are_shown(farpage: Farpage) -> None:
    assert [ViosStatus.model_validate(one).reachable for one in farpage("vios", "list", "--json").json] == [
        True,
        True,
    ]
    info = HypervisorInfo.model_validate(farpage("hypervisor", "show", "--json").json)
    (worker,) = info.workers
    assert worker.cpus == format_cpus(own_cpus())
    assert worker.cpus in farpage("hypervisor", "show").out
    assert farpage("vios", "show", "vios2", "--json").json["health"]["vios"] == "vios2"
    for command in (["vios", "list"], ["hypervisor", "show"], ["vios", "show", "vios1"]):
        answer = farpage(*command)
        assert (answer.status, answer.err) == (0, "")
        assert str(info.pid) in answer.out or "vios1" in answer.out


def test_the_common_device_is_reached_by_both(farpage: Farpage) -> None:
    reached = farpage("device", "list", "--json").json
    assert [one["vios"] for one in reached] == ["vios1", "vios2"]
    assert reached[0]["devices"][0]["id"] == reached[1]["devices"][0]["id"]
    assert "vios1, vios2" in farpage("device", "list").out
    alone = farpage("device", "list", "--vios", "vios2", "--json").json
    assert [one["vios"] for one in alone] == ["vios2"]


def test_a_client_is_made_listed_and_deleted(farpage: Farpage) -> None:
    made = ClientInfo.model_validate(
        farpage("client", "create", "web1", "--memory", "8M", "--limit", "2M", "--json").json
    )
    assert (made.memory_bytes, made.limit_bytes, made.redundancy) == (8 << 20, 2 << 20, "path")
    assert [one["name"] for one in farpage("client", "list", "--json").json] == ["web1"]
    assert "8 MiB" in farpage("client", "list").out
    said = farpage("client", "create", "web2", "--memory", "8M").out
    assert ("no VIOS" in said, "client attach web2" in said) == (False, True)
    assert farpage("client", "delete", "web2").status == 0
    assert "entitlement" in farpage("client", "show", "web1").out
    definitions = eventually(
        lambda: [
            Definition.model_validate(farpage("definition", "show", *options, "--json").json)
            for options in ([], ["--vios", "vios1"], ["--vios", "vios2"])
        ],
        lambda found: found[0] == found[1] == found[2],
    )
    assert "web1" in definitions[0].clients
    assert "web1" in farpage("definition", "show").out
    deleted = farpage("client", "delete", "web1")
    assert (deleted.status, deleted.out) == (0, "client web1 deleted\n")
    assert farpage("client", "list", "--json").json == []


def test_a_running_process_is_attached_limited_and_detached(
    farpage: Farpage, memory_process: subprocess.Popen[str]
) -> None:
    attached = farpage("client", "attach", "job", "--pid", str(memory_process.pid), "--limit", "4M", "--json")
    assert attached.status == 0, attached.err
    assert ClientInfo.model_validate(attached.json).pid == memory_process.pid
    eventually(
        lambda: [
            PathInfo.model_validate(one) for one in farpage("path", "list", "--client", "job", "--json").json
        ],
        lambda paths: sorted(path.state for path in paths) == ["active", "standby"],
    )
    assert "active" in farpage("path", "list").out
    explained = farpage("path", "explain", "job", "--json").json
    assert (explained["way"], explained["first_vioses"]) == ("direct", ["vios1", "vios2"])
    assert [edge["taken"] for edge in explained["edges"]] == [True, True]
    assert "direct access to device" in farpage("path", "explain", "job").out
    assert wrong_pages(memory_process) == 0
    pool = PoolInfo.model_validate(farpage("pool", "set", "--client", "job", "--limit", "8M", "--json").json)
    assert [member.limit_bytes for member in pool.members] == [8 << 20]
    assert "job" in farpage("pool", "show").out
    shown = ClientInfo.model_validate(farpage("client", "show", "job", "--json").json)
    assert shown.counters.page_in_pages > 0
    refused = farpage("client", "delete", "job")
    assert refused.status == ExitStatus.CONFLICT
    assert "detach" in refused.err
    detached = farpage("client", "detach", "job")
    assert (detached.status, detached.err) == (0, "")
    assert wrong_pages(memory_process) == 0


def test_a_device_is_added_to_every_vios(farpage: Farpage, running_set: RunningSet) -> None:
    folder = running_set.state / "more"
    folder.mkdir()
    added = farpage("device", "add", f"dir:{folder}", "--name", "more", "--size", "1G", "--json")
    assert added.status == 0, added.err
    assert [one["devices"][0]["size_bytes"] for one in added.json] == [1 << 30, 1 << 30]
    definition = Definition.model_validate(farpage("definition", "show", "--json").json)
    found = [device for device in definition.devices.values() if device.name == "more"]
    assert [device.is_common for device in found] == [True]


def test_devices_of_one_name_are_listed_as_the_definition_calls_them(
    farpage: Farpage, running_set: RunningSet
) -> None:
    for vios in ("vios1", "vios2"):
        folder = running_set.state / f"of-{vios}"
        folder.mkdir()
        spec = f"dir:{folder}/twin"
        assert farpage("device", "add", spec, "--vios", vios, "--size", "1M").status == 0
    named = {
        vios: [
            device["name"]
            for device in farpage("device", "list", "--vios", vios, "--json").json[0]["devices"]
        ]
        for vios in ("vios1", "vios2")
    }
    assert "twin" in named["vios1"]
    assert "twin-2" in named["vios2"]
    again = farpage("device", "add", spec, "--vios", "vios2", "--json")
    assert again.json[0]["devices"][0]["name"] == "twin-2"


def test_room_that_has_just_come_free_is_used(farpage: Farpage) -> None:
    sizes = [
        device["size_bytes"]
        for one in farpage("device", "list", "--vios", "vios1", "--json").json
        for device in one["devices"]
    ]
    for _ in range(3):
        made = farpage("client", "create", "large", "--memory", str(max(sizes) // 4096 * 3 // 4 * 4096))
        assert made.status == 0, made.err
        assert farpage("client", "delete", "large").status == 0


def test_no_alarm_is_no_output_but_the_header(farpage: Farpage) -> None:
    assert farpage("alarm", "list", "--json").status == 0
    assert farpage("alarm", "list").out.startswith("AT")


@pytest.mark.parametrize(
    ("command", "status", "word"),
    [
        (["client", "show", "nobody"], ExitStatus.NOT_FOUND, "nobody"),
        (["client", "delete", "nobody"], ExitStatus.NOT_FOUND, "nobody"),
        (["client", "detach", "nobody"], ExitStatus.NOT_FOUND, "nobody"),
        (["client", "show", "no/body"], ExitStatus.USAGE, "name"),
        (["client", "create", "Big Name", "--memory", "8M"], ExitStatus.USAGE, "name"),
        (["client", "create", "odd", "--memory", "5000"], ExitStatus.USAGE, "memory_bytes"),
        (["client", "create", "huge", "--memory", "900T"], ExitStatus.CONFLICT, "device"),
        (["client", "create", "x", "--memory", "8M", "--weight", "256"], ExitStatus.USAGE, "weight"),
        (["client", "create", "x", "--memory", "8M", "--redundancy", "raid"], ExitStatus.USAGE, "redundancy"),
        (["client", "attach", "x", "--pid", "0"], ExitStatus.USAGE, "pid"),
        (["client", "attach", "x", "--pid", "4194303"], ExitStatus.NOT_FOUND, "4194303"),
        (["vios", "show", "vios9"], ExitStatus.NOT_FOUND, "vios9"),
        (["definition", "show", "--vios", "vios9"], ExitStatus.NOT_FOUND, "vios9"),
        (["device", "list", "--vios", "vios9"], ExitStatus.NOT_FOUND, "vios9"),
        (["device", "add", "tape:1", "--vios", "vios9"], ExitStatus.NOT_FOUND, "vios9"),
        (["device", "add", "tape:1"], ExitStatus.USAGE, "tape:1"),
        (["device", "add", "dir:/does/not/exist"], ExitStatus.CONFLICT, "/does/not/exist"),
        (["pool", "set"], ExitStatus.USAGE, "--size"),
        (["pool", "set", "--client", "web1"], ExitStatus.USAGE, "--limit"),
        (["pool", "set", "--client", "nobody", "--limit", "8M"], ExitStatus.NOT_FOUND, "nobody"),
        (["path", "list", "--client", "nobody"], ExitStatus.NOT_FOUND, "nobody"),
        (["path", "explain", "nobody"], ExitStatus.NOT_FOUND, "nobody"),
        (["path", "explain", "job", "--to", "nowhere"], ExitStatus.NOT_FOUND, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_says_so_and_changes_nothing(
    farpage: Farpage, command: list[str], status: ExitStatus, word: str
) -> None:
    before = farpage("definition", "show", "--json").out
    assert_refused(farpage(*command), status, word)
    assert farpage("definition", "show", "--json").out == before


def assert_refused(answer: Answer, status: ExitStatus, word: str) -> None:
    assert answer.status == status, answer.err
    assert answer.out == ""
    first, *rest = answer.err.splitlines()
    assert first.startswith("farpage: ")
    assert word in answer.err
    assert rest, "there is no remedy"
    assert "Traceback" not in answer.err


def test_an_old_revision_of_a_dead_vios_is_reported_not_hidden(farpage: Farpage, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(
        json.dumps(
            {
                "format": 1,
                "hypervisor": {"name": "h", "control": f"unix:{tmp_path}/h", "attach": f"unix:{tmp_path}/a"},
                "vioses": {"gone": {"control": f"unix:{tmp_path}/c", "data": [f"unix:{tmp_path}/d"]}},
            }
        )
    )
    answer = farpage("device", "list", "--state", str(tmp_path), "--json")
    assert answer.status == 0
    assert "does not answer" in answer.json[0]["problem"]
    assert (
        farpage("device", "list", "--vios", "gone", "--state", str(tmp_path)).status == ExitStatus.UNREACHABLE
    )
    assert farpage("client", "list", "--state", str(tmp_path)).status == ExitStatus.UNREACHABLE


def test_a_client_is_scrubbed(
    farpage: Farpage, memory_process: subprocess.Popen[str], running_set: RunningSet
) -> None:
    def scrub(*options: str) -> tuple[int, ScrubInfo]:
        answer = farpage("client", "scrub", "vm", "--json", *options)
        info = ClientInfo.model_validate(answer.json).scrub
        assert info is not None
        return answer.status, info

    assert farpage("client", "scrub", "vm").status == ExitStatus.NOT_FOUND
    farpage("client", "attach", "vm", "--pid", str(memory_process.pid), "--limit", "4M")
    assert wrong_pages(memory_process) == 0
    none = farpage("client", "scrub", "vm", "--stop")
    assert (none.status, "no scrub runs" in none.out) == (0, True)
    status, found = scrub()
    assert (status, found.state, found.wrong_pages) == (0, "finished", 0)
    assert found.pages_done == found.pages_total == 4096
    assert found.compared_pages > 2048
    assert "finished" in farpage("client", "show", "vm").out

    status, found = scrub("--background", "--rate", "64K")
    assert (status, found.state) == (0, "running")
    refused = farpage("client", "scrub", "vm")
    assert (refused.status, "--stop" in refused.err) == (ExitStatus.CONFLICT, True)
    status, found = scrub("--stop")
    assert (status, found.state) == (0, "stopped")
    assert found.pages_done < found.pages_total

    # Pages are read in order, so the first are on the device only, and the last in memory too. By the second
    # time each has been paged out, so those in memory are clean.
    assert wrong_pages(memory_process) == 0
    (volume,) = running_set.state.rglob("volumes/vm")
    with volume.open("r+b") as file:
        file.seek(4090 * PAGE_BYTES + 7)
        file.write(b"!")
    status, found = scrub()
    assert (status, found.wrong_pages, found.repaired_pages, found.lost_pages) == (0, 1, 1, 0)
    with volume.open("r+b") as file:
        file.seek(10 * PAGE_BYTES + 7)
        file.write(b"!")
    answer = farpage("client", "scrub", "vm")
    assert answer.status == ExitStatus.FAILURE
    assert "1 wrong, 0 repaired, 1 lost" in answer.out
    with volume.open("r+b") as file:
        file.seek(10 * PAGE_BYTES + 7)
        file.write(b"\0")
    assert scrub()[1].wrong_pages == 0
    assert farpage("client", "detach", "vm").status == 0
    assert farpage("client", "scrub", "vm").status == ExitStatus.CONFLICT
    assert wrong_pages(memory_process) == 0
    assert farpage("client", "delete", "vm").status == 0


def test_a_client_is_moved_and_a_device_emptied(
    farpage: Farpage, memory_process: subprocess.Popen[str], running_set: RunningSet
) -> None:
    def places() -> list[str]:
        return [folder.parent.parent.name for folder in running_set.state.rglob("volumes/guest")]

    assert farpage("client", "move", "guest", "--to", "aside").status == ExitStatus.NOT_FOUND
    assert farpage("client", "attach", "guest", "--pid", str(memory_process.pid), "--limit", "4M").status == 0
    for device in ("aside", "elsewhere"):
        assert farpage("device", "add", f"dir:{running_set.state}/{device}", "--size", "64M").status == 0

    moved = farpage("client", "move", "guest", "--to", "aside")
    assert (moved.status, "is on device aside" in moved.out) == (0, True), moved.err
    assert places() == ["aside"]
    assert "done" in farpage("client", "move-status", "guest").out

    slowly = ("--indirect", "--bandwidth", "64K", "--background")
    begun = farpage("device", "evacuate", "aside", *slowly, "--json")
    assert (begun.status, [info["client"] for info in begun.json["clients"]]) == (0, ["guest"]), begun.err
    copying = eventually(
        lambda: farpage("client", "move-status", "guest", "--json").json,
        lambda move: bool(move["stage"] == "copying"),
    )
    other = "common" if copying["target"] == "elsewhere" else "elsewhere"
    again = farpage("client", "move", "guest", "--to", other)
    assert again.status == ExitStatus.CONFLICT
    assert all(f"client {word} guest" in again.err for word in ("move-status", "cancel-move"))
    assert "paused" in farpage("client", "pause-move", "guest").out
    assert farpage("client", "resume-move", "guest", "--bandwidth", "128K").status == 0
    cancelled = farpage("client", "cancel-move", "guest")
    assert (cancelled.status, "stays on device aside" in cancelled.out) == (0, True), cancelled.err
    assert wrong_pages(memory_process) == 0

    # The evacuation whose move was cancelled looks for that within moments.
    emptied = eventually(
        lambda: farpage("device", "evacuate", "aside"),
        lambda done: "is being evacuated already" not in done.err,
    )
    assert (emptied.status, "done" in emptied.out) == (0, True), emptied.err
    assert "aside" not in places()
    again = farpage("device", "evacuate", "aside")
    assert (again.status, "no client has to be moved" in again.out) == (0, True), again.err
    assert wrong_pages(memory_process) == 0
    assert farpage("client", "detach", "guest").status == 0
    assert farpage("client", "delete", "guest").status == 0


def test_a_vios_is_stopped_and_started(farpage: Farpage) -> None:
    stopped = farpage("vios", "stop", "vios2")
    assert (stopped.status, "nothing in flight" in stopped.out) == (0, True), stopped.err
    assert farpage("vios", "show", "vios2").status == ExitStatus.UNREACHABLE
    started = farpage("vios", "start", "vios2")
    assert (started.status, "has started" in started.out) == (0, True), started.err
    # It is used from then on, not from the hypervisor's next look at it.
    assert farpage("client", "create", "early", "--memory", "4M").status == 0
    shown = eventually(
        lambda: [farpage("definition", "show", "--vios", vios, "--json").json for vios in ("vios1", "vios2")],
        lambda found: bool(found[0] == found[1]),
    )
    assert "early" in shown[0]["clients"]
    assert farpage("client", "delete", "early").status == 0
    assert farpage("vios", "start", "vios2", "--json").json["was_running"]
    assert farpage("vios", "show", "vios2").status == 0
    for verb in ("stop", "start"):
        assert farpage("vios", verb, "ghost").status == ExitStatus.NOT_FOUND


def test_the_definition_is_verified_and_a_copy_promoted_by_force(farpage: Farpage) -> None:
    assert farpage("client", "create", "checked", "--memory", "4M").status == 0
    # A VIOS that took too long over the change gets it a moment later.
    verified = eventually(
        lambda: farpage("definition", "verify"), lambda answer: answer.status == ExitStatus.OK
    )
    assert "all is well" in verified.out
    refused = farpage("definition", "promote", "vios2")
    assert (refused.status, "nothing was changed" in refused.out) == (ExitStatus.CONFLICT, True)
    promoted = farpage("definition", "promote", "vios2", "--force", "--json")
    assert (promoted.status, promoted.json["done"]) == (0, True), promoted.err
    found = eventually(
        lambda: farpage("definition", "verify", "--json").json, lambda found: bool(found["sound"])
    )
    assert found["revision"] >= promoted.json["revision"]
    assert {copy["holder"]: copy["state"] for copy in found["copies"]} == dict.fromkeys(
        ("hypervisor", "vios1", "vios2"), "newest"
    )
    assert farpage("vios", "stop", "vios2").status == 0
    away = farpage("definition", "verify")
    assert (away.status, "vios2" in away.out) == (ExitStatus.FAILURE, True)
    assert farpage("vios", "start", "vios2").status == 0
    assert farpage("client", "delete", "checked").status == 0


def test_a_vios_that_hangs_holds_up_what_is_asked_of_it_for_seconds_only(farpage: Farpage) -> None:
    pid = farpage("vios", "show", "vios2", "--json").json["health"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        said = [
            *(one["problem"] for one in farpage("device", "list", "--json").json if one["problem"]),
            farpage("vios", "show", "vios2").err,
            farpage("definition", "show", "--vios", "vios2").err,
            farpage("definition", "verify").out,
        ]
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [f"has not answered for {VIOS_READ_SECONDS:g} s" in " ".join(text.split()) for text in said] == [
        True
    ] * 4

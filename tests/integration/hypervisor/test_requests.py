"""What the control API refuses, and that nothing changes then; limits, pool and metrics of a running set."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from farpage.definition.model import PAGE_BYTES
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.metrics import COUNTERS
from farpage.hypervisor.model import ClientAttach, ClientCreate, PoolSet
from tests.support.hammer import Hammer, hammering
from tests.support.paged_set import running_set, until_client
from tests.support.scrape import Scrape

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
PAGES = 1024
POOL_BYTES = 64 * MIB
TAKEN = {"name": "taken", "memory_bytes": PAGES * PAGE_BYTES}


@dataclass
class Running:
    """A set with a client that pages a process, and one, `taken`, that does not."""

    embedded: EmbeddedSet
    hammer: Hammer
    http: httpx.AsyncClient

    async def everything(self) -> tuple[object, ...]:
        """Return all that a refused request must leave as it is."""
        info = await self.embedded.hypervisor.client("paged")
        definition = await self.embedded.hypervisor.definition()
        volumes = [
            [(volume.name, volume.size_bytes) for volume in await vios.volumes()]
            for vios in self.embedded.vioses.values()
        ]
        pool = await self.embedded.hypervisor.pool()
        limits = {member.client: member.limit_bytes for member in pool.members}
        attached = (info.attachment, info.pid, info.limit_bytes, info.epoch)
        return definition.devices, definition.clients, volumes, pool.size_bytes, limits, attached


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(hammer_program: Path) -> AsyncIterator[Running]:
    async with (
        running_set(workers=1, pool_size_bytes=POOL_BYTES) as embedded,
        hammering(hammer_program, PAGES) as hammer,
    ):
        await embedded.hypervisor.attach("paged", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await embedded.hypervisor.create_client(ClientCreate.model_validate(TAKEN))
        path = embedded.document.hypervisor.control.removeprefix("unix:")
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url="http://farpage", timeout=30) as http:
            yield Running(embedded, hammer, http)


CREATE = ("POST", "/v1/clients")
ATTACH = ("POST", "/v1/clients/taken/attach")
POOL = ("PUT", "/v1/pool")
NEW = {"name": "new", "memory_bytes": 4 * MIB}

WRONG_VALUES = [
    (CREATE, {"name": "new"}, "memory_bytes"),
    (CREATE, {**NEW, "memory_bytes": 4097}, "memory_bytes"),
    (CREATE, {**NEW, "memory_bytes": 0}, "memory_bytes"),
    (CREATE, {**NEW, "memory_bytes": -4096}, "memory_bytes"),
    (CREATE, {**NEW, "memory_bytes": 1 << 60}, "memory_bytes"),
    (CREATE, {**NEW, "memory_bytes": 4096 * 10**300}, "memory_bytes"),
    (CREATE, {**NEW, "memory_bytes": "much"}, "memory_bytes"),
    (CREATE, {**NEW, "memory_bytes": None}, "memory_bytes"),
    (CREATE, {**NEW, "name": "New"}, "name"),
    (CREATE, {**NEW, "name": "../new"}, "name"),
    (CREATE, {**NEW, "name": "n" * 64}, "name"),
    (CREATE, {**NEW, "name": ""}, "name"),
    (CREATE, {**NEW, "weight": 256}, "weight"),
    (CREATE, {**NEW, "weight": -1}, "weight"),
    (CREATE, {**NEW, "entitlement_bytes": -1}, "entitlement_bytes"),
    (CREATE, {**NEW, "entitlement_bytes": 8 * MIB}, "entitlement_bytes"),
    (CREATE, {**NEW, "entitlement_bytes": 1 << 70}, "entitlement_bytes"),
    (CREATE, {**NEW, "limit_bytes": 0}, "limit_bytes"),
    (CREATE, {**NEW, "limit_bytes": 4096}, "limit_bytes"),
    (CREATE, {**NEW, "limit_bytes": 10**30}, "limit_bytes"),
    (CREATE, {**NEW, "redundancy": "triple"}, "redundancy"),
    (CREATE, {**NEW, "vios_redundancy": True}, "vios_redundancy"),
    (CREATE, {**NEW, "colour": "red"}, "colour"),
    (ATTACH, {}, "pid"),
    (ATTACH, {"pid": 0}, "pid"),
    (ATTACH, {"pid": -1}, "pid"),
    (ATTACH, {"pid": 1 << 22}, "pid"),
    (ATTACH, {"pid": 10**30}, "pid"),
    (ATTACH, {"pid": "one"}, "pid"),
    (ATTACH, {"pid": 1, "limit_bytes": -1}, "limit_bytes"),
    (ATTACH, {"pid": 1, "memory": "r" * 10_000}, "memory"),
    (("POST", "/v1/clients/Taken/attach"), {"pid": 1}, "name"),
    (("POST", f"/v1/clients/{'n' * 64}/attach"), {"pid": 1}, "name"),
    (POOL, {}, "size_bytes"),
    (POOL, {"size_bytes": 0}, "size_bytes"),
    (POOL, {"size_bytes": 10**30}, "size_bytes"),
    (POOL, {"client": "paged"}, "client"),
    (POOL, {"limit_bytes": MIB}, "client"),
    (POOL, {"client": "paged", "limit_bytes": 4096}, "limit_bytes"),
    (POOL, {"client": "paged", "limit_bytes": 10**30}, "limit_bytes"),
    (POOL, {"client": "paged", "limit_bytes": 4096, "size_bytes": 32 * MIB}, "limit_bytes"),
    (("GET", "/v1/paths?client=Taken"), None, "client"),
    (("GET", "/v1/clients/Taken"), None, "name"),
    (("DELETE", "/v1/clients/Taken"), None, "name"),
]


@pytest.mark.parametrize(("request_line", "body", "field"), WRONG_VALUES)
async def test_a_wrong_value_is_answered_with_its_field_and_changes_nothing(
    running: Running, request_line: tuple[str, str], body: dict[str, Any] | None, field: str
) -> None:
    before = await running.everything()
    answer = await running.http.request(*request_line, json=body)
    assert answer.status_code == 422, answer.text
    assert field in answer.json()["error"]["message"]
    assert answer.json()["error"]["remedy"]
    assert await running.everything() == before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"name": "new", "name', b"[" * 50_000]
)
async def test_what_is_no_document_is_refused(running: Running, content: bytes) -> None:
    before = await running.everything()
    for method, path in (CREATE, ATTACH, POOL):
        headers = {"content-type": "application/json"}
        answer = await running.http.request(method, path, content=content, headers=headers)
        assert answer.status_code in (400, 422), answer.text
        assert answer.json()["error"]["remedy"]
    assert await running.everything() == before


async def test_a_body_without_end_is_refused(running: Running) -> None:
    content = b'{"name": "' + b"n" * (17 << 20) + b'"}'
    answer = await running.http.post("/v1/clients", content=content)
    assert answer.status_code == 413


CONFLICTS = [
    (CREATE, TAKEN, 409, "client_exists"),
    (CREATE, {**NEW, "memory_bytes": 1 << 50}, 409, "no_device_fits"),
    (CREATE, {**NEW, "redundancy": "mirror"}, 409, "no_device_fits"),
    (("DELETE", "/v1/clients/paged"), None, 409, "client_attached"),
    (("DELETE", "/v1/clients/nobody"), None, 404, "client_not_found"),
    (("GET", "/v1/clients/nobody"), None, 404, "client_not_found"),
    (("GET", "/v1/paths?client=nobody"), None, 404, "client_not_found"),
    (("POST", "/v1/clients/taken/detach"), None, 409, "client_not_attached"),
    (("POST", "/v1/clients/nobody/detach"), None, 404, "client_not_found"),
    (POOL, {"client": "nobody", "limit_bytes": 2 * MIB}, 404, "client_not_found"),
    (POOL, {"client": "nobody", "limit_bytes": 2 * MIB, "size_bytes": 8 * MIB}, 404, "client_not_found"),
    (POOL, {"size_bytes": MIB // 2}, 409, "pool_too_small"),
    (POOL, {"size_bytes": 2 * MIB, "client": "paged", "limit_bytes": 3 * MIB}, 409, "pool_too_small"),
    (("GET", "/v1/nothing"), None, 404, "no_such_route"),
    (("GET", "/"), None, 404, "no_such_route"),
    (("PATCH", "/v1/pool"), {}, 405, "method_not_allowed"),
]


@pytest.mark.parametrize(("request_line", "body", "status", "code"), CONFLICTS)
async def test_a_request_that_does_not_fit_is_refused_and_changes_nothing(
    running: Running, request_line: tuple[str, str], body: dict[str, Any] | None, status: int, code: str
) -> None:
    before = await running.everything()
    answer = await running.http.request(*request_line, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.json()["error"]["remedy"]
    assert await running.everything() == before


async def refused(running: Running, client: str, body: dict[str, Any], status: int, code: str) -> None:
    before = await running.everything()
    answer = await running.http.post(f"/v1/clients/{client}/attach", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert await running.everything() == before


async def test_attaching_twice_is_refused(running: Running) -> None:
    await refused(running, "paged", {"pid": running.hammer.pid}, 409, "client_attached")
    # Under other names, a new one and one that exists.
    for _ in range(3):
        await refused(running, "other", {"pid": running.hammer.pid}, 409, "already_attached")
    assert (await running.hammer.check()).wrong == 0


async def test_attaching_what_cannot_be_paged_is_refused(running: Running) -> None:
    process = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        await refused(running, "taken", {"pid": process.pid}, 404, "no_shared_memory")
        await refused(running, "new", {"pid": process.pid}, 404, "no_shared_memory")
    finally:
        process.kill()
        await process.wait()
    await refused(running, "taken", {"pid": process.pid}, 404, "process_not_found")


async def test_attaching_with_more_memory_or_less_limit_than_possible_is_refused(
    running: Running, hammer_program: Path
) -> None:
    async with hammering(hammer_program, 2 * PAGES) as hammer:
        await refused(running, "taken", {"pid": hammer.pid}, 409, "memory_too_large")
        await refused(running, "new", {"pid": hammer.pid, "limit_bytes": 4096}, 422, "invalid_input")
        await refused(running, "new", {"pid": hammer.pid, "memory": "rom"}, 404, "no_shared_memory")
        await running.embedded.hypervisor.set_pool(PoolSet(size_bytes=8 * MIB))
        await refused(running, "new", {"pid": hammer.pid}, 409, "pool_too_small")
        await running.embedded.hypervisor.set_pool(PoolSet(size_bytes=POOL_BYTES))
        assert (await hammer.quit()).wrong == 0


async def test_requests_about_one_client_at_once_do_not_mix(running: Running, hammer_program: Path) -> None:
    async with hammering(hammer_program, PAGES) as one, hammering(hammer_program, PAGES) as two:
        answers = await asyncio.gather(
            *(
                running.http.post(
                    "/v1/clients/contended/attach", json={"pid": hammer.pid, "limit_bytes": MIB}
                )
                for hammer in (one, two, one, two)
            )
        )
        codes = sorted("ok" if answer.is_success else answer.json()["error"]["code"] for answer in answers)
        assert codes == ["client_busy"] * 3 + ["ok"]
        await running.embedded.hypervisor.detach("contended")
        await running.embedded.hypervisor.delete_client("contended")
        assert ((await one.quit()).wrong, (await two.quit()).wrong) == (0, 0)


async def test_a_limit_takes_effect_at_once_and_is_kept(running: Running) -> None:
    hypervisor = running.embedded.hypervisor
    for limit_bytes in (3 * MIB, MIB):
        pool = await hypervisor.set_pool(PoolSet(client="paged", limit_bytes=limit_bytes))
        assert {member.client: member.limit_bytes for member in pool.members} == {"paged": limit_bytes}
        assert (await hypervisor.definition()).clients["paged"].limit_bytes == limit_bytes
        info = await until_client(
            hypervisor,
            "paged",
            lambda info: info.limit_bytes * 3 // 4 < info.resident_bytes <= info.limit_bytes,
            "at its limit",
        )
        assert info.limit_bytes == limit_bytes
    assert (await running.hammer.check()).wrong == 0
    await hypervisor.set_pool(PoolSet(client="taken", limit_bytes=2 * MIB))
    assert (await hypervisor.client("taken")).limit_bytes == 2 * MIB


async def test_a_limit_and_the_pool_shrink_together(running: Running) -> None:
    hypervisor = running.embedded.hypervisor
    await hypervisor.set_pool(PoolSet(client="paged", limit_bytes=3 * MIB))
    pool = await hypervisor.set_pool(PoolSet(size_bytes=2 * MIB, client="paged", limit_bytes=MIB))
    assert (pool.size_bytes, pool.members[0].limit_bytes) == (2 * MIB, MIB)
    pool = await hypervisor.set_pool(PoolSet(size_bytes=POOL_BYTES, client="paged", limit_bytes=3 * MIB))
    assert (pool.size_bytes, pool.members[0].limit_bytes) == (POOL_BYTES, 3 * MIB)
    await hypervisor.set_pool(PoolSet(client="paged", limit_bytes=MIB))


async def test_metrics_say_what_the_api_says(running: Running) -> None:
    hypervisor = running.embedded.hypervisor
    await until_client(hypervisor, "paged", lambda info: len(info.paths) == 2, "two paths")
    scrape = await Scrape.of(running.embedded.document.hypervisor.control)
    info = await hypervisor.client("paged")
    states = scrape.families["farpage_client_memory_bytes"].samples
    assert sum(sample.value for sample in states) == info.memory_bytes
    for name in COUNTERS:
        assert scrape.value(f"farpage_client_{name}_total", client="paged") <= getattr(info.counters, name)
    assert scrape.value("farpage_client_page_out_pages_total", client="paged") > 0
    assert scrape.value("farpage_client_limit_bytes", client="paged") == info.limit_bytes
    assert scrape.value("farpage_client_epoch", client="paged") == info.epoch
    for path in info.paths:
        states = scrape.families["farpage_path_state"].samples
        ones = [s.labels["state"] for s in states if s.labels["vios"] == path.vios and s.value == 1]
        assert ones == [path.state]
        assert scrape.value("farpage_vios_up", vios=path.vios) == 1
    assert scrape.value("farpage_pool_bytes") == POOL_BYTES
    waits = scrape.families["farpage_client_fault_wait_seconds"]
    buckets = [sample.value for sample in waits.samples if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert scrape.value("farpage_client_fault_wait_seconds_count", client="paged") == buckets[-1] > 0
    for family in scrape.families.values():
        assert family.documentation, family.name

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest
from fastapi import Request
from pydantic import BaseModel

from farpage.address import UnixAddress
from farpage.api.client import ControlClient
from farpage.api.errors import create_app
from farpage.api.limit import MAX_BODY_BYTES
from farpage.api.remote import RemoteError
from farpage.api.serve import ControlServer, Peer, peer_of
from farpage.api.sockets import AddressInUse
from farpage.errors import ExitStatus, InvalidInput, Unreachable
from farpage.log import Line, diverted
from tests.support.nbd import short_folder


class Number(BaseModel):
    value: int


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


@pytest.fixture
async def path(folder: Path) -> AsyncIterator[str]:
    app = create_app("test", "1")
    peers: list[Peer | None] = []

    @app.get("/numbers")
    async def numbers() -> tuple[Number, ...]:
        return (Number(value=1), Number(value=2))

    @app.post("/numbers")
    async def post(number: Number) -> Number:
        if number.value == 13:
            raise InvalidInput("value", "13 is no lucky number", "take 14")
        if number.value == 500:
            raise RuntimeError("a bug")
        return number

    @app.get("/peer")
    async def peer(request: Request) -> tuple[int, int]:
        found = peer_of(request)
        assert found is not None
        peers.append(found)
        return (found.pid, found.uid)

    server = ControlServer(app, [UnixAddress(f"{folder}/api")])
    await server.start()
    yield str(folder / "api")
    await server.stop()


@pytest.fixture
async def client(path: str) -> AsyncIterator[ControlClient]:
    async with ControlClient(f"unix:{path}") as opened:
        yield opened


async def test_documents_go_both_ways(client: ControlClient) -> None:
    assert await client.get("/numbers", tuple[Number, ...]) == (Number(value=1), Number(value=2))
    assert await client.post("/numbers", Number(value=7), Number) == Number(value=7)


async def test_an_error_arrives_with_code_message_remedy_and_exit_status(client: ControlClient) -> None:
    with pytest.raises(RemoteError) as caught:
        await client.post("/numbers", Number(value=13), Number)
    assert caught.value.http_status == 422
    assert str(caught.value) == "value: 13 is no lucky number; take 14"
    assert caught.value.exit_status is ExitStatus.USAGE


async def test_a_bug_is_logged_answered_and_does_not_end_the_connection(client: ControlClient) -> None:
    logs: list[Line] = []
    with diverted(logs.append):
        with pytest.raises(RemoteError) as caught:
            await client.post("/numbers", Number(value=500), Number)
        assert caught.value.http_status == 500
        assert "a bug" not in str(caught.value)
        assert await client.post("/numbers", Number(value=7), Number) == Number(value=7)
    assert [line["event"] for line in logs] == ["unexpected_error"]


@pytest.mark.parametrize(
    ("request_line", "body", "status", "code"),
    [
        ("GET /nothing", b"", 404, "no_such_route"),
        ("DELETE /numbers", b"", 405, "method_not_allowed"),
        ("POST /numbers", b"", 422, "invalid_input"),
        ("POST /numbers", b"{", 422, "invalid_input"),
        ("POST /numbers", b"[" * 100_000, 400, "bad_request"),
        ("POST /numbers", b"\xff\xfe", 422, "invalid_input"),
        ("POST /numbers", b'{"value": "many"}', 422, "invalid_input"),
        ("POST /numbers", b'{"value": 1' + b" " * MAX_BODY_BYTES + b"}", 413, "request_entity_too_large"),
        ("GET /docs", b"", 404, "no_such_route"),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_bad_requests_are_answered_in_one_shape(
    path: str, request_line: str, body: bytes, status: int, code: str
) -> None:
    method, target = request_line.split()
    transport = httpx.AsyncHTTPTransport(uds=path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as plain:
        answer = await plain.request(
            method, target, content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "remedy", "details"}
    assert error["code"] == code
    assert error["message"]
    assert error["remedy"]


async def test_the_description_lists_the_errors(client: ControlClient) -> None:
    description = await client.request("GET", "/openapi.json")
    assert b"ErrorAnswer" in description


async def test_rubbish_on_the_socket_does_not_end_the_server(path: str, client: ControlClient) -> None:
    for rubbish in (os.urandom(512), b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(rubbish)
        writer.write_eof()
        await reader.read()
        writer.close()
    assert len(await client.get("/numbers", tuple[Number, ...])) == 2


async def test_the_peer_s_process_is_known(client: ControlClient) -> None:
    assert await client.get("/peer", tuple[int, int]) == (os.getpid(), os.getuid())


async def test_the_socket_is_for_its_owner_alone_and_goes_with_the_server(folder: Path) -> None:
    server = ControlServer(create_app("test", "1"), [UnixAddress(f"{folder}/other")])
    await server.start()
    assert (folder / "other").stat().st_mode & 0o777 == 0o600
    await server.stop()
    assert not (folder / "other").exists()
    await server.stop()


async def test_the_socket_of_a_dead_process_is_replaced(folder: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(folder / "stale"))
    dead.listen()
    dead.close()
    server = ControlServer(create_app("test", "1"), [UnixAddress(f"{folder}/stale")])
    await server.start()
    await server.stop()


async def test_the_socket_of_a_running_process_is_left_alone(path: str, client: ControlClient) -> None:
    with pytest.raises(AddressInUse, match="running process"):
        await ControlServer(create_app("test", "1"), [UnixAddress(path)]).start()
    assert len(await client.get("/numbers", tuple[Number, ...])) == 2


async def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    (folder / "file").write_text("precious")
    with pytest.raises(InvalidInput, match="not a socket"):
        await ControlServer(create_app("test", "1"), [UnixAddress(f"{folder}/file")]).start()
    assert (folder / "file").read_text() == "precious"


async def test_a_path_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(InvalidInput, match="cannot listen"):
        await ControlServer(create_app("test", "1"), [UnixAddress("/proc/nothing/socket")]).start()


async def test_nobody_there_is_unreachable(folder: Path) -> None:
    async with ControlClient(f"unix:{folder}/nobody", who="VIOS one") as client:
        with pytest.raises(Unreachable, match="VIOS one") as caught:
            await client.get("/numbers", tuple[Number, ...])
    assert caught.value.exit_status is ExitStatus.UNREACHABLE


async def test_a_daemon_that_does_not_answer_is_unreachable_after_the_timeout(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "silent"))
        silent.listen()
        async with ControlClient(f"unix:{folder}/silent", timeout_seconds=0.05) as client:
            with pytest.raises(Unreachable):
                await client.get("/numbers", Number)


async def test_an_answer_of_another_kind_is_an_error(client: ControlClient) -> None:
    with pytest.raises(RemoteError, match="not the document expected"):
        await client.get("/numbers", Number)


async def test_a_request_in_progress_is_finished_when_the_server_stops(folder: Path) -> None:
    app = create_app("test", "1")
    entered, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    @app.get("/slow")
    async def slow() -> Number:
        loop.call_soon_threadsafe(entered.set)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(release.wait(), loop))
        return Number(value=1)

    server = ControlServer(app, [UnixAddress(f"{folder}/slow")])
    await server.start()
    async with ControlClient(f"unix:{folder}/slow") as client:
        asked = asyncio.create_task(client.get("/slow", Number))
        await entered.wait()
        stopping = asyncio.create_task(server.stop())
        release.set()
        assert await asked == Number(value=1)
        await stopping


async def test_a_server_without_requests_sleeps(client: ControlClient) -> None:
    await client.get("/numbers", tuple[Number, ...])
    (serving,) = [thread for thread in threading.enumerate() if thread.name == "control"]
    assert serving.native_id is not None
    await asyncio.sleep(0.1)  # what is left to do after an answer
    before = _sleeps(serving.native_id)
    await asyncio.sleep(0.5)
    assert _sleeps(serving.native_id) - before <= 1


def _sleeps(thread: int) -> int:
    """Return how often a thread has begun to wait (proc(5), voluntary_ctxt_switches)."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


async def test_answers_are_dated(path: str) -> None:
    transport = httpx.AsyncHTTPTransport(uds=path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as plain:
        for _ in range(2):
            (date,) = (await plain.get("/numbers")).headers.get_list("date")
            assert abs(datetime.now(UTC) - parsedate_to_datetime(date)) < timedelta(seconds=5)


async def test_a_server_that_is_stopped_before_its_loop_runs_stops(folder: Path) -> None:
    for _ in range(20):
        server = ControlServer(create_app("test", "1"), [UnixAddress(f"{folder}/brief")])
        await server.start()
        async with asyncio.timeout(5):
            await server.stop()

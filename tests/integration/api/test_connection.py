"""`ControlClient.look`: what is asked again and again, over a connection that is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

import pytest
from pydantic import BaseModel

from farpage.address import UnixAddress
from farpage.api.client import ControlClient
from farpage.api.connection import BODY_BYTES_MAX
from farpage.api.errors import create_app
from farpage.api.remote import RemoteError
from farpage.api.serve import ControlServer
from farpage.errors import InvalidInput, Unreachable
from tests.support.nbd import short_folder

WAIT_SECONDS: Final = 10.0


class Number(BaseModel):
    value: int


Answerer: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Serves one connection by hand."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


@asynccontextmanager
async def daemon(path: Path, value: int) -> AsyncIterator[None]:
    """A control API as the daemons have one."""
    app = create_app("test", "1")

    @app.get("/number")
    async def number() -> Number:
        return Number(value=value)

    @app.get("/many")
    async def many() -> tuple[Number, ...]:
        return tuple(Number(value=n) for n in range(100_000))

    @app.get("/refused")
    async def refused() -> Number:
        raise InvalidInput("value", "13 is no lucky number", "take 14")

    server = ControlServer(app, [UnixAddress(str(path))])
    await server.start()
    try:
        yield
    finally:
        await server.stop()


@asynccontextmanager
async def served_by_hand(path: Path, answerer: Answerer) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """Somebody else at the socket; yields the connections that were made so far."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            await answerer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # hung up
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield connections
    finally:
        server.close()
        for connection in connections:
            connection.close()


def answer(value: int, headers: str = "") -> bytes:
    body = Number(value=value).model_dump_json()
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{headers}\r\n{body}".encode()


async def request(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def test_a_daemon_that_runs_is_looked_at_over_one_connection(folder: Path) -> None:
    async def counting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for value in range(100):
            assert (await request(reader)).startswith(b"GET /number HTTP/1.1\r\nhost: farpage\r\n")
            writer.write(answer(value))

    async with (
        served_by_hand(folder / "api", counting) as connections,
        ControlClient(f"unix:{folder}/api") as client,
    ):
        for value in range(3):
            assert await client.look("/number", Number) == Number(value=value)
        assert len(connections) == 1


async def test_documents_of_any_length_and_errors_are_those_that_get_has(folder: Path) -> None:
    async with daemon(folder / "api", 1), ControlClient(f"unix:{folder}/api") as client:
        assert len(await client.look("/many", tuple[Number, ...])) == 100_000
        with pytest.raises(RemoteError, match="13 is no lucky number; take 14") as caught:
            await client.look("/refused", Number)
        assert caught.value.http_status == 422
        with pytest.raises(RemoteError, match="not the document expected"):
            await client.look("/many", Number)
        assert await client.look("/number", Number) == Number(value=1)


async def test_a_daemon_that_was_started_again_meanwhile_answers_at_once(folder: Path) -> None:
    async with ControlClient(f"unix:{folder}/api") as client:
        for value in (1, 2):
            async with daemon(folder / "api", value):
                assert await client.look("/number", Number) == Number(value=value)
        with pytest.raises(Unreachable, match="No such file"):
            await client.look("/number", Number)


@asynccontextmanager
async def late_once(path: Path, asked: asyncio.Event, late: asyncio.Event) -> AsyncIterator[None]:
    """Answers the first connection with 1 as soon as it is late, others at once with 2."""
    values = iter((1, 2))

    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        value = next(values)
        await request(reader)
        asked.set()
        if value == 1:
            await late.wait()
        writer.write(answer(value))
        await reader.read()

    async with served_by_hand(path, answering):
        yield


async def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one_s(folder: Path) -> None:
    asked, late = asyncio.Event(), asyncio.Event()
    async with late_once(folder / "api", asked, late), ControlClient(f"unix:{folder}/api") as client:
        with pytest.raises(Unreachable, match="has not answered"):
            await client.look("/number", Number, timeout_seconds=0.05)
        assert asked.is_set()
        late.set()
        assert await client.look("/number", Number) == Number(value=2)


@pytest.mark.parametrize("look", [ControlClient.look, ControlClient.get])
async def test_a_daemon_that_accepts_connections_and_hangs_is_not_said_to_be_away(
    folder: Path, look: Callable[..., Awaitable[Number]]
) -> None:
    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with served_by_hand(folder / "api", silent), ControlClient(f"unix:{folder}/api") as client:
        with pytest.raises(Unreachable) as caught:
            await look(client, "/number", Number, timeout_seconds=0.05)
    assert "it accepts connections but has not answered for 0.05 s" in caught.value.cause
    assert "it hangs" in caught.value.advice


async def test_the_answer_to_a_look_that_was_cancelled_is_not_taken_for_the_next_one_s(folder: Path) -> None:
    asked, late = asyncio.Event(), asyncio.Event()
    async with late_once(folder / "api", asked, late), ControlClient(f"unix:{folder}/api") as client:
        looking = asyncio.create_task(client.look("/number", Number))
        await asked.wait()
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        late.set()
        assert await client.look("/number", Number) == Number(value=2)


async def test_who_looks_while_another_one_does_need_not_wait_for_it(folder: Path) -> None:
    asked, release = asyncio.Event(), asyncio.Event()
    async with late_once(folder / "api", asked, release), ControlClient(f"unix:{folder}/api") as client:
        first = asyncio.create_task(client.look("/number", Number))
        await asked.wait()
        assert await client.look("/number", Number) == Number(value=2)
        release.set()
        assert await first == Number(value=1)


async def test_a_connection_that_a_daemon_announces_to_close_is_not_used_again(folder: Path) -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer(1, "Connection: close\r\n"))
        await reader.read()  # it has yet to do so

    async with (
        served_by_hand(folder / "api", closing) as connections,
        ControlClient(f"unix:{folder}/api") as client,
    ):
        for _ in range(2):
            assert await client.look("/number", Number) == Number(value=1)
        assert len(connections) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Server disconnected"),
        (b"rubbish\r\n\r\n", "not one of a farpage daemon"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "not one of a farpage daemon"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "not one of a farpage daemon"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1), "not one of a farpage"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", "ended within an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "ended within an answer"),
        (b"A" * 200_000, "not HTTP"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_what_is_no_answer_of_a_daemon_is_an_error(folder: Path, content: bytes, problem: str) -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(content)

    async with (
        served_by_hand(folder / "api", other),
        ControlClient(f"unix:{folder}/api", who="VIOS one", timeout_seconds=WAIT_SECONDS) as client,
    ):
        with pytest.raises(Unreachable, match=rf"VIOS one .*{problem}"):
            await client.look("/number", Number)

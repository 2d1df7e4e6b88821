"""Client of the control APIs."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from farpage.address import Address, TcpAddress, UnixAddress, parse_address
from farpage.api.connection import Connection, ConnectionBroken, ConnectionSilent, NotConnected, Response
from farpage.api.remote import RemoteError, remote_error
from farpage.api.tls import client_context, explain, needed, tls_problem
from farpage.errors import Unreachable

if TYPE_CHECKING:
    import httpx

Answer = TypeVar("Answer")
Parameters = Mapping[str, str | int]

DEFAULT_TIMEOUT_SECONDS = 30.0


class ControlClient:
    """Talks to one daemon; connections are kept between requests. Use it from one event loop.

    Every request raises `Unreachable` when no answer comes (its outcome is unknown then), and
    `RemoteError` when the answer is an error.

    :raise InvalidInput: `address` is not one, or a TCP port without certificates.
    :raise CertificatesUnusable: those in the folder `tls` cannot be used.
    """

    def __init__(
        self,
        address: Address | str,
        *,
        who: str = "the daemon",
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        tls: Path | None = None,
    ) -> None:
        self.address = parse_address(address) if isinstance(address, str) else address
        self._context: ssl.SSLContext | None = None
        if isinstance(self.address, TcpAddress):
            self._context = client_context(needed(tls, self.address, field="address"))
        self._who = who
        self._timeout_seconds = timeout_seconds
        self._kept: Connection | None = None
        """For `look`, while nobody is looking."""
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        if self._kept is not None:
            self._kept.close()
        if "_http" in vars(self):
            await self._http.aclose()

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        # Loaded with the first request: a hypervisor has more urgent things to do when it starts.
        from farpage.api.http import httpx

        limits = httpx.Limits(max_connections=16, max_keepalive_connections=4, keepalive_expiry=60)
        if isinstance(self.address, UnixAddress):
            # This is no HTTPS; loading the certificates for it would take longer than a whole request.
            transport = httpx.AsyncHTTPTransport(uds=self.address.path, limits=limits, verify=False)
            base_url = "http://farpage"
        else:
            assert self._context is not None
            transport = httpx.AsyncHTTPTransport(limits=limits, verify=self._context)
            base_url = str(httpx.URL(scheme="https", host=self.address.host, port=self.address.port))
        return httpx.AsyncClient(
            transport=transport,
            verify=False,
            base_url=base_url,
            timeout=self._timeout_seconds,
            trust_env=False,
        )

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | bytes | None = None,
        params: Parameters | None = None,
        timeout_seconds: float | None = None,
    ) -> bytes:
        """Send one request, with a document or with bytes as they are, and return the answer's body.

        :raise Unreachable: no answer; whether the request was carried out is unknown.
        :raise RemoteError: the answer is an error.
        """
        from farpage.api.http import httpx

        content = body.model_dump_json().encode() if isinstance(body, BaseModel) else body
        kind = "application/json" if isinstance(body, BaseModel) else "application/octet-stream"
        headers = {} if content is None else {"content-type": kind}
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            response = await self._http.request(
                method, path, content=content, params=params, headers=headers, timeout=seconds
            )
        except httpx.ConnectTimeout as problem:
            raise self._unreachable(NotConnected(seconds)) from problem
        except httpx.TimeoutException as problem:
            raise self._unreachable(ConnectionSilent(seconds)) from problem
        except (httpx.HTTPError, ssl.SSLError) as problem:
            raise self._unreachable(problem) from problem
        if response.status_code >= 400:
            raise remote_error(response.status_code, response.content)
        return response.content

    def _unreachable(self, problem: Exception) -> Unreachable:
        # A server that refuses our certificate says so only after the handshake, where httpx does not
        # expect it.
        refused = tls_problem(problem)
        cause, hint = str(problem) or type(problem).__name__, "check that it runs"
        if isinstance(problem, ConnectionSilent):
            hint = "it hangs or is stopped, or its storage hangs: look at its process and into its log"
        if refused is not None:
            cause, hint = explain(refused)
        return Unreachable(self._who, str(self.address), cause, hint)

    async def look(self, path: str, answer: type[Answer], *, timeout_seconds: float | None = None) -> Answer:
        """GET `path` as `get` does, for what is asked all the time: at a tenth of the processor time.

        :raise Unreachable: no answer.
        :raise RemoteError: the answer is an error, or not the document expected.
        """
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            response = await self._look(path, seconds)
        except (ConnectionBroken, ssl.SSLError) as problem:
            raise self._unreachable(problem) from problem
        if response.status >= 400:
            raise remote_error(response.status, response.body)
        return _parse(answer, response.body)

    async def _look(self, path: str, timeout_seconds: float) -> Response:
        """Ask over the connection that is kept; one who looks while another one does makes one more."""
        connection, self._kept = self._kept, None
        if connection is None or not connection.usable:
            if connection is not None:
                connection.close()
            connection = await Connection.open(self.address, self._context, timeout_seconds=timeout_seconds)
        try:
            response = await connection.get(path, timeout_seconds=timeout_seconds)
        except BaseException:  # also when cancelled: its answer would be taken for the next one's
            connection.close()
            raise
        if connection.usable and self._kept is None and not self._closed:
            self._kept = connection
        else:
            connection.close()
        return response

    async def get(
        self,
        path: str,
        answer: type[Answer],
        *,
        params: Parameters | None = None,
        timeout_seconds: float | None = None,
    ) -> Answer:
        """GET `path`, read the answer as `answer`: a model, or `tuple[Model, ...]`."""
        return _parse(answer, await self.request("GET", path, params=params, timeout_seconds=timeout_seconds))

    async def post(
        self,
        path: str,
        body: BaseModel | None,
        answer: type[Answer],
        *,
        params: Parameters | None = None,
        timeout_seconds: float | None = None,
    ) -> Answer:
        """POST `body` to `path`."""
        content = await self.request("POST", path, body=body, params=params, timeout_seconds=timeout_seconds)
        return _parse(answer, content)

    async def put(
        self,
        path: str,
        body: BaseModel | bytes,
        answer: type[Answer],
        *,
        params: Parameters | None = None,
        timeout_seconds: float | None = None,
    ) -> Answer:
        """PUT `body` to `path`."""
        content = await self.request("PUT", path, body=body, params=params, timeout_seconds=timeout_seconds)
        return _parse(answer, content)

    async def patch(
        self,
        path: str,
        body: BaseModel,
        answer: type[Answer],
        *,
        params: Parameters | None = None,
        timeout_seconds: float | None = None,
    ) -> Answer:
        """PATCH `path` with `body`."""
        content = await self.request("PATCH", path, body=body, params=params, timeout_seconds=timeout_seconds)
        return _parse(answer, content)

    async def delete(
        self, path: str, *, params: Parameters | None = None, timeout_seconds: float | None = None
    ) -> None:
        """DELETE `path`."""
        await self.request("DELETE", path, params=params, timeout_seconds=timeout_seconds)


_READERS: Final[dict[Any, TypeAdapter[Any]]] = {}
"""By what they read; making one takes longer than a request."""


def _parse(answer: type[Answer], content: bytes) -> Answer:
    reader: TypeAdapter[Answer] | None = _READERS.get(answer)
    if reader is None:
        reader = _READERS[answer] = TypeAdapter(answer)
    try:
        return reader.validate_json(content)
    except ValidationError as problem:
        raise RemoteError(
            200,
            "unexpected_answer",
            f"the answer is not the document expected: {problem.errors()[0]['msg']}",
            "check that the daemon and this program are of the same version",
        ) from problem

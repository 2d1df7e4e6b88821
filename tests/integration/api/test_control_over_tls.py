from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from farpage.address import Address, TcpAddress, UnixAddress
from farpage.api.client import ControlClient
from farpage.api.errors import create_app
from farpage.api.model import ErrorBody
from farpage.api.serve import ControlServer
from farpage.api.sockets import AddressInUse
from farpage.api.tls import CA, CERTIFICATE, KEY, CertificatesUnusable, client_context
from farpage.errors import InvalidInput, Unreachable
from tests.support.certificates import certificate_folder

ANY_PORT = TcpAddress("127.0.0.1", 0)
OTHER_CA = trustme.CA()
DAYS_AGO = datetime.now(UTC) - timedelta(days=3)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificates(tmp_path: Path, authority: trustme.CA) -> Path:
    return certificate_folder(tmp_path / "tls", authority, "127.0.0.1")


@pytest.fixture
async def server(tmp_path: Path, certificates: Path) -> AsyncIterator[ControlServer]:
    app = create_app("test", "1")

    @app.get("/word")
    async def word() -> ErrorBody:
        return ErrorBody(code="word", message="", remedy="")

    server = ControlServer(app, [UnixAddress(f"{tmp_path}/api"), ANY_PORT], certificates)
    await server.start()
    yield server
    await server.stop()


async def ask(address: Address, tls: Path | None) -> str:
    """Ask in both ways, which have to come to the same."""
    async with ControlClient(address, who="VIOS one", tls=tls) as client:
        try:
            said = (await client.get("/word", ErrorBody)).code
        except Unreachable as problem:
            with pytest.raises(Unreachable) as caught:
                await client.look("/word", ErrorBody)
            assert str(caught.value) == str(problem)
            raise
        for _ in range(2):
            assert (await client.look("/word", ErrorBody)).code == said
        return said


async def test_the_same_api_answers_at_a_unix_socket_and_at_a_port(
    server: ControlServer, certificates: Path
) -> None:
    unix, tcp = server.addresses
    assert await ask(unix, None) == "word"
    assert await ask(tcp, certificates) == "word"


async def test_who_has_no_certificate_of_the_ca_gets_nothing(
    server: ControlServer, certificates: Path, tmp_path: Path
) -> None:
    _, tcp = server.addresses
    assert isinstance(tcp, TcpAddress)
    strange = certificate_folder(tmp_path / "strange", OTHER_CA, "127.0.0.1")
    # It trusts the server, and shows a certificate of another CA.
    both = client_context(strange)
    both.load_verify_locations(certificates / CA)
    nothing = ssl.create_default_context(cafile=certificates / CA)
    for context in (both, nothing):
        with (
            socket.create_connection((tcp.host, tcp.port)) as plain,
            context.wrap_socket(plain, server_hostname=tcp.host) as connection,
            pytest.raises(ssl.SSLError, match=r"(?i)alert (unknown ca|certificate required)"),
        ):
            # In TLS 1.3 the client's handshake ends before the server has judged its certificate.
            connection.sendall(b"GET /word HTTP/1.1\r\nhost: farpage\r\n\r\n")
            connection.recv(1)
    with socket.create_connection((tcp.host, tcp.port)) as plain:
        plain.sendall(b"GET /word HTTP/1.1\r\nhost: farpage\r\n\r\n")
        plain.settimeout(10)
        assert plain.recv(100) == b""
    assert await ask(tcp, certificates) == "word"


async def test_older_tls_is_not_spoken(server: ControlServer, certificates: Path) -> None:
    _, tcp = server.addresses
    assert isinstance(tcp, TcpAddress)
    context = ssl.create_default_context(cafile=certificates / CA)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((tcp.host, tcp.port)) as plain,
        pytest.raises(ssl.SSLError, match="version"),
    ):
        context.wrap_socket(plain, server_hostname=tcp.host)


async def test_a_server_of_another_ca_is_not_believed(server: ControlServer, tmp_path: Path) -> None:
    strange = certificate_folder(tmp_path / "strange", OTHER_CA, "127.0.0.1")
    with pytest.raises(Unreachable, match=r"certificate is not one of our CA.*the same ca\.pem"):
        await ask(server.addresses[1], strange)


async def test_a_refused_client_is_told_so(tmp_path: Path, certificates: Path) -> None:
    # The client knows the server's CA beside its own, whose certificates the server does not take.
    strange = certificate_folder(tmp_path / "strange", OTHER_CA, "127.0.0.1")
    with (strange / CA).open("ab") as file:
        file.write((certificates / CA).read_bytes())
    server = ControlServer(create_app("test", "1"), [ANY_PORT], certificates)
    await server.start()
    try:
        with pytest.raises(Unreachable, match="does not accept our certificate"):
            await ask(server.addresses[0], strange)
    finally:
        await server.stop()


async def test_a_server_must_have_the_name_it_is_called_by(tmp_path: Path, authority: trustme.CA) -> None:
    elsewhere = certificate_folder(tmp_path / "elsewhere", authority, "vios2.example")
    server = ControlServer(create_app("test", "1"), [ANY_PORT], elsewhere)
    await server.start()
    try:
        with pytest.raises(Unreachable, match="does not name this host"):
            await ask(server.addresses[0], elsewhere)
    finally:
        await server.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
async def test_nobody_there_is_unreachable(certificates: Path, host: str) -> None:
    with pytest.raises(Unreachable, match=f"VIOS one at tcp:{host}:1 does not answer"):
        await ask(TcpAddress(host, 1), certificates)


async def test_without_certificates_no_port_is_served_or_asked() -> None:
    with pytest.raises(InvalidInput, match="--tls DIR"):
        ControlServer(create_app("test", "1"), [ANY_PORT])
    with pytest.raises(InvalidInput, match="--tls DIR"):
        ControlClient("tcp:127.0.0.1:1")


@pytest.mark.parametrize("missing", [CA, CERTIFICATE, KEY])
def test_a_file_that_is_missing_is_named(certificates: Path, missing: str) -> None:
    (certificates / missing).unlink()
    with pytest.raises(CertificatesUnusable, match=rf"{missing}: no such file"):
        client_context(certificates)


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_may_read_is_refused(certificates: Path, mode: int) -> None:
    (certificates / KEY).chmod(mode)
    with pytest.raises(CertificatesUnusable, match=rf"key\.pem: others .* {mode:04o}.*chmod 600"):
        client_context(certificates)


@pytest.mark.parametrize("name", [CA, CERTIFICATE, KEY])
def test_what_is_no_certificate_or_key_is_refused(certificates: Path, name: str) -> None:
    (certificates / name).write_text("rubbish\n")
    with pytest.raises(CertificatesUnusable, match=r"PEM"):
        client_context(certificates)


def test_an_own_certificate_that_has_expired_is_refused(tmp_path: Path, authority: trustme.CA) -> None:
    expired = certificate_folder(tmp_path / "expired", authority, "127.0.0.1", not_after=DAYS_AGO)
    with pytest.raises(CertificatesUnusable, match=r"cert\.pem: it, or ca\.pem, has expired"):
        client_context(expired)


def test_an_own_certificate_of_another_ca_is_refused(certificates: Path) -> None:
    OTHER_CA.cert_pem.write_to_path(certificates / CA)
    with pytest.raises(CertificatesUnusable, match=r"cert\.pem: is not signed by ca\.pem"):
        client_context(certificates)


def test_a_key_of_another_certificate_is_refused(certificates: Path, authority: trustme.CA) -> None:
    authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(certificates / KEY)
    with pytest.raises(CertificatesUnusable, match=r"key\.pem: is not the key of cert\.pem"):
        client_context(certificates)


async def test_where_one_address_is_taken_none_is_listened_at(tmp_path: Path, certificates: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        addresses: list[Address] = [UnixAddress(f"{tmp_path}/api")]
        addresses.append(TcpAddress("127.0.0.1", taken.getsockname()[1]))
        server = ControlServer(create_app("test", "1"), addresses, certificates)
        with pytest.raises(AddressInUse, match="tcp:127"):
            await server.start()
        assert not (tmp_path / "api").exists()
        await server.stop()

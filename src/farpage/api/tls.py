"""Mutual TLS of the control APIs over TCP: whoever has a certificate of the installation's CA is let in.

A folder holds what one host needs:

    ca.pem      the certificate of the CA that signs for this installation and nothing else
    cert.pem    the host's own certificate, which names the host as others write it in addresses
    key.pem     its key, unencrypted, which only its owner may read

TLS 1.3 only: it encrypts certificates too, and leaves no choice of ciphers to get wrong.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farpage.address import Address, TcpAddress
from farpage.errors import ExitStatus, FarpageError, InvalidInput
from farpage.log import get_logger

log = get_logger()

CA, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"

X509_V_ERR_CERT_NOT_YET_VALID: Final = 9
X509_V_ERR_CERT_HAS_EXPIRED: Final = 10
"""x509_vfy.h of OpenSSL."""

_ALERTED: Final = ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "UNSUPPORTED_PROTOCOL")
"""Reasons of a server to end a handshake that its client understands: an alert was written for it."""


@dataclass(eq=False)
class CertificatesUnusable(FarpageError):
    """A file of a certificate folder is missing or cannot be used."""

    code = "certificates_unusable"
    template = "{file}: {problem}"
    remedy = "{hint}"
    exit_status = ExitStatus.USAGE
    file: str
    problem: str
    hint: str


def server_context(folder: Path) -> ssl.SSLContext:
    """Return what a server on asyncio needs that lets in certificates of the folder's CA alone.

    :raise CertificatesUnusable: naming the file.
    """
    context = _contexts(folder)[0]
    context.sslobject_class = _TellingWhy
    return context


def client_context(folder: Path) -> ssl.SSLContext:
    """Return what a client needs: it shows its certificate, and the server's must name the server's host.

    :raise CertificatesUnusable: naming the file.
    """
    return _contexts(folder)[1]


def check_addresses(addresses: Iterable[Address], folder: Path | None, *, field: str) -> None:
    """See that control APIs can be served or asked at these addresses, before anything is started.

    :raise InvalidInput: naming `field`: one of them is a TCP port and there is no folder of certificates.
    :raise CertificatesUnusable: those in the folder cannot be used.
    """
    for address in addresses:
        if isinstance(address, TcpAddress):
            needed(folder, address, field=field)
    if folder is not None:
        _contexts(folder)


def needed(folder: Path | None, address: TcpAddress, *, field: str) -> Path:
    """Return the folder of certificates, without which nothing is said or heard over TCP.

    :raise InvalidInput: naming `field`: there is none.
    """
    if folder is None:
        raise InvalidInput(
            field,
            f"{address} is a TCP port, where orders are given and taken with certificates alone",
            f"add --tls DIR, a folder with {CA}, {CERTIFICATE} and {KEY}, or use unix:PATH",
        )
    return folder


def explain(problem: ssl.SSLError) -> tuple[str, str]:
    """Word a failed handshake, as seen by a client: the cause and the remedy."""
    text = str(problem)
    if isinstance(problem, ssl.SSLCertVerificationError):
        if problem.verify_code in (X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID):
            return f"its {problem.verify_message}", f"give it a new {CERTIFICATE}, and start it again"
        if "match" in problem.verify_message.lower():
            return (
                f"its certificate does not name this host ({problem.verify_message.rstrip('.')})",
                f"have its {CERTIFICATE} name the host as in the address, or use a name that it has",
            )
        return (
            f"its certificate is not one of our CA ({problem.verify_message})",
            f"give both sides the same {CA} and certificates that it has signed",
        )
    lowered = text.lower()
    if "alert" in lowered and ("certificate" in lowered or "unknown ca" in lowered or "decrypt" in lowered):
        return (
            f"it does not accept our certificate ({problem.reason or text})",
            f"use a {CERTIFICATE} that is valid and signed by the CA of its {CA}",
        )
    return (
        f"no TLS 1.3 connection comes about ({problem.reason or text})",
        "check that it was started with --tls",
    )


def tls_problem(error: BaseException | None) -> ssl.SSLError | None:
    """Return the failed handshake that an HTTP client's exception comes from, if it does."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return error
        error = error.__cause__ or error.__context__
    return None


class _TellingWhy(ssl.SSLObject):
    """Logs why a client is refused, and lets it know.

    asyncio drops the connection of a handshake that fails together with the alert that OpenSSL has written
    for the client. Where the handshake wants to be gone on with instead, it sends what has been written; it
    fails when the client answers or hangs up.
    """

    _refusal: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        try:
            super().do_handshake()
        except ssl.SSLWantReadError:
            raise
        except ssl.SSLError as refusal:
            problem = refusal.reason
            if isinstance(refusal, ssl.SSLCertVerificationError):
                problem = refusal.verify_message
            elif problem not in _ALERTED:
                raise  # no TLS at all: who is there would wait for more
            log.warning("tls_refused", problem=problem)
            self._refusal = refusal
            raise ssl.SSLWantReadError from refusal


def _contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    folder = folder.expanduser()
    for name in (CA, CERTIFICATE, KEY):
        _check_readable(folder / name)
    mode = (folder / KEY).stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise CertificatesUnusable(
            str(folder / KEY),
            f"others than its owner may use it (mode {stat.S_IMODE(mode):04o})",
            f"chmod 600 {folder / KEY}; make a new key if somebody else may have read it",
        )
    server = _context(ssl.PROTOCOL_TLS_SERVER, folder)
    client = _context(ssl.PROTOCOL_TLS_CLIENT, folder)
    server.verify_mode = ssl.CERT_REQUIRED
    # What others would refuse is refused here, where its remedy is: expired, another CA's, no server's.
    client.check_hostname = False
    try:
        _shake_hands(server, client)
    except ssl.SSLError as problem:
        raise _own_refused(folder, problem) from problem
    client.check_hostname = True
    return server, client


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as problem:
        raise CertificatesUnusable(
            str(path),
            (problem.strerror or "cannot be read").lower(),
            f"the folder of --tls needs {CA}, {CERTIFICATE} and {KEY}, readable for user {os.geteuid()}",
        ) from problem


def _context(protocol: int, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(folder / CA)
    except ssl.SSLError as problem:
        raise CertificatesUnusable(
            str(folder / CA), "holds no certificate in PEM", "put the CA's certificate there"
        ) from problem
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password=bytes)
    except (ssl.SSLError, ValueError) as problem:
        if getattr(problem, "reason", None) == "KEY_VALUES_MISMATCH":
            raise CertificatesUnusable(
                str(folder / KEY),
                f"is not the key of {CERTIFICATE}",
                "put both there that were made together",
            ) from problem
        raise CertificatesUnusable(
            str(folder / CERTIFICATE),
            f"it or {KEY} is not in PEM, or the key is encrypted ({problem})",
            "put a certificate in PEM and its unencrypted key there",
        ) from problem
    return context


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Connect the two in memory.

    :raise SSLError: one refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)


def _own_refused(folder: Path, problem: ssl.SSLError) -> CertificatesUnusable:
    certificate = str(folder / CERTIFICATE)
    if not isinstance(problem, ssl.SSLCertVerificationError):
        return CertificatesUnusable(
            certificate, f"is of no use for TLS 1.3 ({problem.reason})", "make a new one"
        )
    if problem.verify_code in (X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID):
        what = "has expired" if problem.verify_code == X509_V_ERR_CERT_HAS_EXPIRED else "is not valid yet"
        return CertificatesUnusable(
            certificate, f"it, or {CA}, {what}", "make a new one, or set this host's clock right"
        )
    return CertificatesUnusable(
        certificate,
        f"is not signed by {CA} for servers and clients ({problem.verify_message})",
        f"have the CA of {CA} sign it, for both uses",
    )

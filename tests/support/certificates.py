"""Certificates of a CA of the test's own, as `farpage.api.tls` wants them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import trustme

from farpage.api.tls import CA, CERTIFICATE, KEY


def certificate_folder(
    folder: Path, authority: trustme.CA, *names: str, not_after: datetime | None = None
) -> Path:
    """Make a host's folder; `names` are its names and addresses."""
    folder.mkdir(parents=True, exist_ok=True)
    issued = authority.issue_cert(*names, not_after=not_after)
    authority.cert_pem.write_to_path(folder / CA)
    (folder / CERTIFICATE).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    (folder / KEY).touch(mode=0o600)
    issued.private_key_pem.write_to_path(folder / KEY)
    return folder

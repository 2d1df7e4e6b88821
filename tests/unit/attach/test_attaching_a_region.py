from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from farpage.attach.messages import AttachReply, AttachRequest, ErrorDocument, encode
from farpage.attach.region import Region, RegionRefused, _attach
from farpage.errors import Unreachable

REFUSAL = AttachReply(
    ok=False, error=ErrorDocument(code="invalid_input", message="too small", remedy="ask for more")
)


class AnsweredWhileItSends(socket.socket):
    """The peer has answered and closed before `sendmsg` returns."""

    peer: socket.socket

    def sendmsg(self, *arguments: Any) -> int:
        sent = super().sendmsg(*arguments)
        self.peer.recv(65536)
        self.peer.sendall(encode(REFUSAL))
        self.peer.close()
        return sent


def test_a_hypervisor_that_refuses_at_once_and_hangs_up_is_heard() -> None:
    ours, theirs = socket.socketpair()
    with AnsweredWhileItSends(fileno=ours.detach()) as connection, open(os.devnull) as descriptor:
        connection.peer = theirs
        request = AttachRequest(size_bytes=4096, start_address=4096)
        with pytest.raises(RegionRefused, match="too small; ask for more"):
            _attach(connection, "/attach.sock", request, descriptor.fileno(), descriptor.fileno())


def test_it_is_attached_where_the_set_of_the_state_folder_says(tmp_path: Path) -> None:
    elsewhere = tmp_path / "host1.sock"
    with pytest.raises(Unreachable, match=re.escape(str(tmp_path / "hypervisor" / "attach.sock"))):
        Region(4096, state=tmp_path)
    for document in ("{", "[]", '{"hypervisor": {"attach": "unix:"}}', '{"hypervisor": {"attach": 7}}'):
        (tmp_path / "set.json").write_text(document)
        with pytest.raises(Unreachable, match=re.escape(str(tmp_path / "hypervisor" / "attach.sock"))):
            Region(4096, state=tmp_path)
    (tmp_path / "set.json").write_text(json.dumps({"hypervisor": {"attach": f"unix:{elsewhere}"}}))
    with pytest.raises(Unreachable, match=re.escape(str(elsewhere))):
        Region(4096, state=tmp_path)

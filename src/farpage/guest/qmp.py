"""QEMU's machine protocol, as much as a guest needs: one command at a time over a UNIX socket.

See docs/interop/qmp-spec.rst of QEMU: one JSON document a line; a greeting, `qmp_capabilities`, then
commands, with events in between.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from farpage.errors import FarpageError


@dataclass(eq=False)
class QmpFailed(FarpageError):
    """QEMU did not accept a command, or went away."""

    code = "qmp_failed"
    template = "QMP command {command!r} failed: {cause_text}"
    remedy = "see QEMU's messages"
    command: str
    cause_text: str


async def execute(socket_path: str, command: str, **arguments: Any) -> Any:
    """Connect, run one command and return its `return` value.

    :raise QmpFailed: when QEMU refuses it, does not answer or is gone.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(socket_path)
    except OSError as error:
        raise QmpFailed(command, str(error)) from error
    try:
        await reader.readline()
        await _command(reader, writer, "qmp_capabilities", {})
        return await _command(reader, writer, command, arguments)
    except (OSError, ValueError) as error:
        raise QmpFailed(command, str(error)) from error
    finally:
        writer.close()


async def _command(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str, arguments: dict[str, Any]
) -> Any:
    writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    while line := await reader.readline():
        answer = json.loads(line)
        if "return" in answer:
            return answer["return"]
        if "error" in answer:
            raise QmpFailed(command, answer["error"]["desc"])
    raise QmpFailed(command, "QEMU closed the connection")

"""A Python process that runs statements one by one as it is told, for what a test must not do itself."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any, Self

_MAIN = """
import json, sys
names = {}
for line in sys.stdin:
    try:
        source = json.loads(line)
        try:
            code = compile(source, "script", "eval")
        except SyntaxError:
            exec(compile(source, "script", "exec"), names)
            answer = {"value": None}
        else:
            answer = {"value": eval(code, names)}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


ANSWER_SECONDS = 120.0


class Scripted:
    """`await process.run("expression or statements")` returns the value, which JSON can hold."""

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    async def send(self, source: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(source).encode() + b"\n")
        await self.process.stdin.drain()

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_SECONDS)
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["value"]

    async def run(self, source: str) -> Any:
        await self.send(source)
        return await self.answer()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error::ResourceWarning", "-c", _MAIN),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment},
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()

"""Errors as HTTP answers: every answer of 400 or above is an `ErrorAnswer`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic.warnings import UnsupportedFieldAttributeWarning
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farpage.api.framework import FastAPI, JSONResponse, Request, RequestValidationError
from farpage.api.limit import BodyLimit
from farpage.api.model import ErrorAnswer, ErrorBody
from farpage.api.remote import HTTP_STATUS
from farpage.errors import FarpageError
from farpage.log import get_logger

log = get_logger()

MAX_PROBLEMS = 5
"""So many wrong fields are named in one answer."""


def answer(http_status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> JSONResponse:
    """Make the HTTP answer."""
    return JSONResponse(ErrorAnswer(error=body).model_dump(), int(http_status), headers)


def error_body(error: FarpageError) -> ErrorBody:
    """Return the JSON form of an error, with its plain attributes as details."""
    details = {
        name: value for name, value in vars(error).items() if isinstance(value, bool | int | float | str)
    }
    return ErrorBody(code=error.code, message=error.cause, remedy=error.advice, details=details)


def name_of_field(location: Sequence[int | str]) -> str:
    """Spell pydantic's location of a wrong value: `("body", "volumes", 0, "name")` is `volumes[0].name`."""
    parts = list(location)
    if len(parts) > 1 and parts[0] in {"body", "query", "path", "header"}:
        parts = parts[1:]
    spelled = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return spelled.removeprefix(".") or "request"


def describe_problems(problems: Sequence[Any]) -> tuple[str, str]:
    """Name the first wrong field, and say all problems in one line."""
    named = [
        ("body", f"not JSON ({problem['ctx']['error']})")
        if problem["type"] == "json_invalid"
        else (name_of_field(problem["loc"]), str(problem["msg"]))
        for problem in problems
    ]
    text = "; ".join(f"{name}: {message}" for name, message in named[:MAX_PROBLEMS])
    if len(named) > MAX_PROBLEMS:
        text += f"; and {len(named) - MAX_PROBLEMS} more"
    return named[0][0] if named else "request", text


async def _farpage_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FarpageError)
    return answer(HTTP_STATUS[error.exit_status], error_body(error))


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    name, text = describe_problems(error.errors())
    body = ErrorBody(
        code="invalid_input",
        message=text,
        remedy="correct the request; GET /openapi.json describes it",
        details={"field": name},
    )
    return answer(HTTPStatus.UNPROCESSABLE_ENTITY, body)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    phrase = HTTPStatus(error.status_code).phrase.lower()
    code, message = phrase.replace(" ", "_"), f"{what}: {error.detail}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        code, message = "no_such_route", f"{what} is not part of this API"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{what}: the path exists but not with this method"
    body = ErrorBody(code=code, message=message, remedy="GET /openapi.json lists the requests")
    return answer(error.status_code, body, dict(error.headers or {}))


class _Unexpected:
    """ASGI middleware: any other exception is logged and answered with 500.

    Starlette's own handler raises it again, upon which uvicorn closes the connection under the next request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            what = f"{scope.get('method', '')} {scope.get('path', '')}"
            log.exception("unexpected_error", request=what)
            if started:
                raise
            body = ErrorBody(
                code="internal",
                message=f"{what} failed unexpectedly ({type(error).__name__})",
                remedy="look into the daemon's log, which has the traceback; please report it",
            )
            await answer(HTTPStatus.INTERNAL_SERVER_ERROR, body)(scope, receive, send)


def create_app(title: str, version: str) -> FastAPI:
    """Make a control API: errors answered as `ErrorAnswer`, bodies bounded, OpenAPI at /openapi.json."""
    # FastAPI keeps pydantic from warning of its own annotations while it makes a route; documents that are
    # built when they are used first bring the same warning later.
    warnings.filterwarnings("ignore", category=UnsupportedFieldAttributeWarning)
    app = FastAPI(
        title=title,
        version=version,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    )
    app.add_exception_handler(FarpageError, _farpage_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(BodyLimit)
    app.add_middleware(_Unexpected)
    return app

"""A daemon's answer of 400 or above as an error again; without FastAPI, which takes long to load."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

from pydantic import ValidationError

from farpage.api.model import ErrorAnswer
from farpage.errors import ExitStatus, FarpageError

HTTP_STATUS = {
    ExitStatus.FAILURE: HTTPStatus.INTERNAL_SERVER_ERROR,
    ExitStatus.USAGE: HTTPStatus.UNPROCESSABLE_ENTITY,
    ExitStatus.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ExitStatus.CONFLICT: HTTPStatus.CONFLICT,
    ExitStatus.UNREACHABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ExitStatus.UNSUPPORTED: HTTPStatus.NOT_IMPLEMENTED,
}

EXIT_STATUS = {int(http): exit_status for exit_status, http in HTTP_STATUS.items()} | {
    400: ExitStatus.USAGE,
    405: ExitStatus.USAGE,
    413: ExitStatus.USAGE,
    502: ExitStatus.UNREACHABLE,
    504: ExitStatus.UNREACHABLE,
}


@dataclass(eq=False)
class RemoteError(FarpageError):
    """A daemon answered with an error; `code` and `exit_status` are those of the daemon's own error."""

    template = "{message}"
    remedy = "{remedy_text}"
    http_status: int
    remote_code: str
    message: str
    remedy_text: str
    details: dict[str, bool | int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Both are class variables of FarpageError; here they depend on the answer.
        vars(self)["code"] = self.remote_code
        vars(self)["exit_status"] = EXIT_STATUS.get(self.http_status, ExitStatus.FAILURE)


def remote_error(http_status: int, body: bytes) -> RemoteError:
    """Build the error from an answer, also from one that no farpage daemon has written."""
    try:
        error = ErrorAnswer.model_validate_json(body).error
    except ValidationError:
        return RemoteError(
            http_status,
            "unexpected_answer",
            f"the answer has status {http_status} and is not farpage's",
            "check that a farpage daemon of this version listens at this address",
        )
    return RemoteError(http_status, error.code, error.message, error.remedy, error.details)

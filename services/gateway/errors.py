"""Errors as the OpenAI API shapes them. Pure."""

from __future__ import annotations

import math
from typing import Any

from llmos.ipc.errors import HostDown, LLMOSError

INVALID = "invalid_request_error"

# The status, type and code of each error; what a client may do about it follows from the status.
BY_CODE: dict[str, tuple[int, str, str | None]] = {
    "EINVAL": (400, INVALID, None),
    "EACCES": (403, "permission_error", "permission_denied"),
    "ENOENT": (404, INVALID, "model_not_found"),
    "EBUSY": (429, "rate_limit_error", "rate_limit_exceeded"),
    "ENOMEM": (503, "server_error", "insufficient_memory"),
    "ETIMEDOUT": (504, "server_error", "timeout"),
    "ECANCELED": (499, "server_error", "canceled"),
    "EHOSTDOWN": (502, "server_error", "service_unavailable"),
    "ENOSYS": (501, "server_error", "not_supported"),
}
RETRY_SECONDS = 1.0


class ApiError(Exception):
    """An answer that is an error: its HTTP status and its body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = RETRY_SECONDS,
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """{"error": ...}, as every OpenAI client reads it."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def unauthorized(message: str) -> ApiError:
    """401: no key, or one that is not valid."""
    return ApiError(401, message, code="invalid_api_key")


def from_error(error: LLMOSError) -> ApiError:
    """The answer for an error of the system."""
    status, type, code = BY_CODE.get(error.code, (500, "server_error", None))
    param = error.details.get("param")
    if error.code == "EINVAL" and {"limit", "tokens"} <= error.details.keys():
        code, param = "context_length_exceeded", param or "messages"
    if error.code == "ENOENT":
        param = "model"
    if isinstance(error, HostDown) and not error.details.get("delivered", True):
        status = 503
    param = param if isinstance(param, str) else None
    wait = error.details.get("retry_after")
    wait = wait if isinstance(wait, int | float) else RETRY_SECONDS
    return ApiError(status, error.message, type=type, param=param, code=code, retry_after=wait)

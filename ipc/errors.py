"""Typed errors: few, POSIX-named, the same on the wire and in Python.

LLMOSError
├── InvalidArgument   EINVAL     an argument is malformed or out of range
├── NotFound          ENOENT     no such service, model, task or page
├── AccessDenied      EACCES     the capability does not allow this
├── Busy              EBUSY      a queue is full; try again later
├── NoMemory          ENOMEM     admission refused: it would not fit
├── TimedOut          ETIMEDOUT  the deadline passed, or cannot be met
├── Canceled          ECANCELED  the caller or an operator withdrew it
├── HostDown          EHOSTDOWN  the server died before it answered
├── ProtocolError     EPROTO     the message breaks the wire protocol
├── NotSupported      ENOSYS     the server does not have this method
└── IOFailure         EIO        a device, disk or peer failed
"""

from __future__ import annotations

from typing import ClassVar


class LLMOSError(Exception):
    """Base of all errors that cross the wire; ``code`` is the POSIX name."""

    code: ClassVar[str] = ""

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class InvalidArgument(LLMOSError):
    code = "EINVAL"


class NotFound(LLMOSError):
    code = "ENOENT"


class AccessDenied(LLMOSError):
    code = "EACCES"


class Busy(LLMOSError):
    code = "EBUSY"


class NoMemory(LLMOSError):
    code = "ENOMEM"


class TimedOut(LLMOSError):
    code = "ETIMEDOUT"


class Canceled(LLMOSError):
    code = "ECANCELED"


class HostDown(LLMOSError):
    code = "EHOSTDOWN"


class ProtocolError(LLMOSError):
    code = "EPROTO"


class NotSupported(LLMOSError):
    code = "ENOSYS"


class IOFailure(LLMOSError):
    code = "EIO"


BY_CODE: dict[str, type[LLMOSError]] = {cls.code: cls for cls in LLMOSError.__subclasses__()}


def from_code(code: str, message: str, **details: object) -> LLMOSError:
    """The error for a wire code; an unknown code, from a newer peer, becomes IOFailure."""
    cls = BY_CODE.get(code)
    return cls(message, **details) if cls else IOFailure(f"{code}: {message}", **details)

"""What an author of a driver writes: a class with a few callbacks; the SDK owns the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmos.drivers.sdk.messages import (
    DriverInfo,
    EncodedStep,
    EncodeStep,
    LoadedModel,
    LoadProgress,
    LoadRequest,
    Quantum,
    Step,
)
from llmos.ipc.errors import NotSupported

PendingStep = Callable[[], Step]
"""Waits for a dispatched step and returns what it produced."""

PendingEncoding = Callable[[], EncodedStep]
"""Waits for a dispatched step of an encoder and returns what it made."""


@dataclass(frozen=True)
class Pending:
    """A ``PendingStep`` that tells, without waiting, whether it is done: replicas are waited for by turns."""

    resolve: Callable[[], Step]
    ready: Callable[[], bool]

    def __call__(self) -> Step:
        return self.resolve()


Progress = Callable[[LoadProgress], None]


class Driver:
    """Base of every driver; a callback that is left out answers ENOSYS.

    All callbacks run on one thread, one at a time, except that the generator of the next quantum may be
    started while steps of the one before it are still pending. Raise the errors of ``llmos.ipc.errors``;
    anything else ends the process, and the supervisor starts it again.
    """

    def describe(self) -> DriverInfo:
        """Say what this driver is, without touching a device for longer than a moment."""
        raise NotSupported("this driver does not describe itself")

    def load(self, request: LoadRequest, progress: Progress) -> LoadedModel:
        """Load a model; call ``progress`` at least once a second. InvalidArgument names the bad tensor."""
        raise NotSupported("this driver loads no models")

    def execute(self, quantum: Quantum) -> Iterator[PendingStep]:
        """Yield once for every step, *after dispatching it*; at most two of a replica are pending at a time.
        A driver with replicas yields ``Pending``.

        The SDK closes the generator between steps to preempt, so state must be consistent at each yield.
        """
        raise NotSupported("this driver executes nothing")

    def idle(self) -> bool:
        """Called while there is nothing to execute: do something useful for less than a second, if there is
        anything; True asks to be called again."""
        return False

    def encode(self, request: EncodeStep) -> PendingEncoding:
        """Dispatch one step of an encoder, and return at once with what waits for it."""
        raise NotSupported("this driver has no encoders")

    def reset(self, model: str, replica: int) -> None:
        """Empty all slots of a replica, of all where it is -1; nothing is in flight there. The KV in its
        pages need not be kept."""
        raise NotSupported("this driver cannot empty its slots")

    def unload(self, model: str) -> None:
        """Forget a model and free its memory; also called for each model when the driver is stopped."""
        raise NotSupported("this driver unloads nothing")

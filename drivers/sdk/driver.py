"""What an author of a driver writes: a class with a few callbacks; the SDK owns the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from llmos.drivers.sdk.messages import (
    DriverInfo,
    EncodedStep,
    EncodeStep,
    LoadAdapter,
    LoadedAdapter,
    LoadedModel,
    LoadProgress,
    LoadRequest,
    Move,
    Moved,
    Quantum,
    Step,
)
from llmos.ipc.errors import NotSupported

PendingStep = Callable[[], Step]
"""Waits for a dispatched step and returns what it produced."""

PendingEncoding = Callable[[], EncodedStep]
"""Waits for a dispatched step of an encoder and returns what it made."""

Finish = Callable[[], Moved]

PendingMove = Callable[[], Finish]
"""The slow part of a move, run on a worker thread while steps go on: it copies, and returns what is left
to do on the driver's thread, which must be quick and may dispatch to the device."""

FinishAdapter = Callable[[], LoadedAdapter]

PendingAdapter = Callable[[], FinishAdapter]
"""As ``PendingMove``, of an adapter that is being read."""

Bytes = bytes | memoryview

Put = Callable[[int, Bytes], None]
"""Takes the bytes of the page at an index; may be called from several threads at once."""

Get = Callable[[int], Bytes]
"""Returns the bytes of the page at an index; may be called from several threads at once."""


Result = TypeVar("Result", Step, EncodedStep)


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """A pending step that tells, without waiting, whether it is done: replicas are waited for by turns, and
    a step that ends sooner than others like it is not waited for as long as they are.

    ``overlaps`` says that the next step begins on the device before this one ends, as in a pipeline: then it
    is dispatched at once, and not shortly before the end.
    """

    resolve: Callable[[], Result]
    ready: Callable[[], bool]
    overlaps: bool = False

    def __call__(self) -> Result:
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

    def move(self, move: Move, key: bytes) -> PendingMove:
        """Dispatch the copying of pages between tiers, without waiting for it.

        The SDK has checked the numbers. ``key`` (32 bytes) seals the tenant's blocks where a tier is the
        disk, and is empty otherwise. What reads the device is dispatched here, behind the steps dispatched
        so far. What writes it is dispatched by ``Finish``, which is called once the steps of all quanta that
        came before are dispatched. Moves are copied one at a time, in the order of the calls of ``move``.
        """
        raise NotSupported("this driver moves no pages")

    def save(self, model: str, replica: int, pages: list[int], put: Put) -> PendingMove:
        """Read pages for a file, in the manner of a move from the device: ``put(i, ...)`` takes page i of
        the list. They are read as the steps dispatched so far leave them, though their owner may be gone."""
        raise NotSupported("this driver saves no pages")

    def restore(self, model: str, replica: int, pages: list[int], get: Get) -> PendingMove:
        """Write pages from a file, in the manner of a move to the device: ``get(i)`` has page i of the list,
        and raises IOFailure where the file was changed: then nothing may be written to any of them."""
        raise NotSupported("this driver restores no pages")

    def load_adapter(self, request: LoadAdapter) -> PendingAdapter:
        """Load a LoRA adapter: what is returned reads it on a worker thread, and returns what is left to do,
        as in a move. Sequences that run are not disturbed. InvalidArgument names the bad tensor; Busy where
        there is no room for another."""
        raise NotSupported("this driver loads no adapters")

    def unload_adapter(self, model: str, adapter: str) -> None:
        """Forget an adapter; Busy while a sequence in a slot has it."""
        raise NotSupported("this driver loads no adapters")

    def reset(self, model: str, replica: int) -> None:
        """Empty all slots of a replica, of all where it is -1; nothing is in flight there. The KV in its
        pages need not be kept."""
        raise NotSupported("this driver cannot empty its slots")

    def park(self, model: str) -> PendingMove:
        """Move a model's weights to host memory and free all it has on the device, its KV included.

        Nothing of it is in flight, and until it is awake it is asked for nothing but ``wake`` and ``unload``;
        other models go on. The copying is done by what is returned, on a worker thread; ``Finish`` frees the
        device. Where either raises NoMemory or IOFailure, the model is as it was, but for its KV and slots.
        """
        raise NotSupported("this driver parks no models")

    def wake(self, model: str) -> PendingMove:
        """Put the weights of a parked model back, with empty slots and as many pages as before, in the manner
        of ``park``; nothing is read, converted or compiled. NoMemory where the device has not got the room:
        then it stays parked."""
        raise NotSupported("this driver wakes no models")

    def unload(self, model: str) -> None:
        """Forget a model and free its memory; also called for each model when the driver is stopped."""
        raise NotSupported("this driver unloads nothing")

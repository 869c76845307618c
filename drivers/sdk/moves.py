"""Moves of pages between tiers: checked, begun in order, copied on a worker thread while steps go on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol

from llmos.drivers.sdk.driver import Finish, PendingMove
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import LoadedModel, Move, Moved, Tier
from llmos.ipc.background import Background
from llmos.ipc.errors import Canceled, InvalidArgument, LLMOSError

Begin = Callable[[], PendingMove]


class Sink(Protocol):
    """Where the result of one move goes."""

    def done(self, moved: Moved) -> None: ...
    def fail(self, error: LLMOSError) -> None: ...


def check_move(move: Move, loaded: LoadedModel) -> None:
    """Refuse a move that names a page or block that is not there, or writes one twice."""
    sizes: dict[Tier, int] = {"device": loaded.pages, "host": loaded.host_pages, "disk": loaded.disk_pages}
    if move.source == move.target:
        raise InvalidArgument(f"a move goes from one tier to another, not from {move.source} to itself")
    for tier, numbers in zip((move.source, move.target), _sides(move), strict=True):
        outside = [number for number in numbers if not 0 <= number < sizes[tier]]
        if outside:
            raise InvalidArgument(f"{tier} has no page {outside[0]}: it has {sizes[tier]} of this model")
    targets = _sides(move)[1]
    if not targets or len(set(targets)) < len(targets):
        raise InvalidArgument("a move copies a page at least, and writes none twice")
    check_replica(move.replica, loaded)
    if not move.tenant:
        raise InvalidArgument("a move names the tenant whose pages they are")


def check_replica(replica: int, loaded: LoadedModel) -> None:
    """Refuse a replica that is not there."""
    if not 0 <= replica < loaded.replicas:
        raise InvalidArgument(f"there is no replica {replica}: this model has {loaded.replicas}")


def _sides(move: Move) -> tuple[list[int], list[int]]:
    return [source for source, _ in move.pages], [target for _, target in move.pages]


class _Transfer:
    """A move between its arrival and its answer."""

    def __init__(self, model: str, replica: int, begin: Begin, sink: Sink) -> None:
        self.model = model
        self.replica = replica
        self.begin = begin
        self.sink = sink
        self.copying: Future[Finish] | None = None
        self.reached = False


class Moves:
    """The moves that are under way. Used from the driver's thread, beside which ``background`` copies."""

    def __init__(self, executor: Executor, background: Background) -> None:
        self._executor = executor
        self._background = background
        self._open: list[_Transfer] = []

    def submit(self, model: str, replica: int, begin: Begin, sink: Sink, *, reads_device: bool) -> None:
        """Begin a checked move behind the quanta submitted so far.

        One that does not read the device is copied meanwhile, unless it might overtake one that does.
        """
        transfer = _Transfer(model, replica, begin, sink)
        ahead = all(other.copying is not None for other in self._open)
        self._open.append(transfer)
        if ahead and not reads_device:
            self._begin(transfer)
        self._executor.after(model, replica, lambda: self._reach(transfer))

    def abandon(self, model: str = "", replica: int = -1) -> None:
        """Drop the moves of a model (any, if none is named) and a replica (any, if -1); what is being copied
        is waited for, since its pages may be gone next."""
        dropped = [
            transfer
            for transfer in self._open
            if model in ("", transfer.model) and replica in (-1, transfer.replica)
        ]
        self._open = [transfer for transfer in self._open if transfer not in dropped]
        wait([transfer.copying for transfer in dropped if transfer.copying is not None])
        for transfer in dropped:
            transfer.sink.fail(Canceled("the driver's pages were given up"))

    def _begin(self, transfer: _Transfer) -> None:
        try:
            pending = transfer.begin()
        except LLMOSError as error:
            self._open.remove(transfer)
            transfer.sink.fail(error)
            return
        transfer.copying = self._background.run(pending, lambda _: self._settle(transfer))

    def _reach(self, transfer: _Transfer) -> None:
        """All that came before is dispatched."""
        transfer.reached = True
        if transfer in self._open and transfer.copying is None:
            self._begin(transfer)
        self._settle(transfer)

    def _settle(self, transfer: _Transfer) -> None:
        """Finish a move that is copied and whose turn has come."""
        copying = transfer.copying
        if transfer not in self._open or copying is None or not (transfer.reached and copying.done()):
            return
        self._open.remove(transfer)
        try:
            transfer.sink.done(copying.result()())
        except LLMOSError as error:
            transfer.sink.fail(error)

"""Saving and restoring the pages of a task: moves whose other end is a file."""

from __future__ import annotations

import secrets

from llmos.drivers.sdk.driver import Driver, Finish, PendingMove, Put
from llmos.drivers.sdk.messages import LoadedModel, Moved, RestoreTask, SaveTask, TaskSaved
from llmos.drivers.sdk.moves import check_replica
from llmos.drivers.sdk.saved import Contents, SavedFile, write
from llmos.ipc.errors import InvalidArgument, IOFailure, LLMOSError, NotSupported
from llmos.ipc.server import Incoming
from llmos.services.saved import FileHeader

FILE_ID_BYTES = 16


def check_pages(pages: list[int], replica: int, loaded: LoadedModel) -> None:
    """Refuse a replica or pages that are not there, or named twice."""
    check_replica(replica, loaded)
    outside = [page for page in pages if not 0 <= page < loaded.pages]
    if outside or len(set(pages)) < len(pages):
        raise InvalidArgument(f"pages are different numbers below {loaded.pages}")


class Saving:
    """One task on its way to a file."""

    def __init__(
        self, driver: Driver, request: SaveTask, loaded: LoadedModel, layout: str, key: bytes
    ) -> None:
        self._driver = driver
        self._request = request
        self._page_bytes = loaded.page_bytes
        self._layout = layout
        self._key = key
        self._put: Put = _not_yet
        self.result = TaskSaved(0, 0)

    def begin(self) -> PendingMove:
        """Dispatch the reading of the pages; where the driver cannot, the file is written without any."""
        pages = self._request.pages
        pending: PendingMove | None = None
        if pages:
            try:
                pending = self._driver.save(
                    self._request.model, self._request.replica, pages, lambda i, data: self._put(i, data)
                )
            except NotSupported:
                pages = []
        return lambda: self._write(pending, len(pages))

    def _write(self, pending: PendingMove | None, pages: int) -> Finish:
        contents = Contents(
            file=secrets.token_bytes(FILE_ID_BYTES),
            layout=self._layout,
            digest=self._request.digest,
            pages=pages,
            page_bytes=self._page_bytes,
            state=self._request.state,
        )

        def fill(put: Put) -> Finish:
            self._put = put
            return pending() if pending is not None else lambda: Moved(0, 0)

        header = FileHeader(self._request.model)
        finish, size = write(self._request.name, self._key, header, contents, fill)
        self.result = TaskSaved(pages, size)
        return finish


class SavedSink:
    """Answers the call that asked for a task to be saved."""

    def __init__(self, saving: Saving, call: Incoming) -> None:
        self._saving = saving
        self._call = call

    def done(self, moved: Moved) -> None:
        self._call.reply(self._saving.result)

    def fail(self, error: LLMOSError) -> None:
        self._call.fail(error)


def restore(driver: Driver, request: RestoreTask, layout: str, key: bytes) -> PendingMove:
    """Begin to fill pages from a file. NotSupported where its pages are of another kind, IOFailure where it
    was changed or has the KV of other tokens."""
    file = SavedFile(request.name, key)
    try:
        _check(file.contents, request, layout)
        pending = driver.restore(
            request.model, request.replica, request.pages, lambda index: file.page(request.first + index)
        )
    except LLMOSError:
        file.close()
        raise

    def copy() -> Finish:
        try:
            return pending()
        finally:
            file.close()

    return copy


def _check(contents: Contents, request: RestoreTask, layout: str) -> None:
    if contents.layout != layout:
        raise NotSupported(f"the pages of this saved task are {contents.layout}; here they are {layout}")
    if contents.digest != request.digest:
        raise IOFailure("this saved task has the KV of other tokens")
    if not 0 <= request.first <= contents.pages - len(request.pages):
        raise InvalidArgument(f"this saved task has {contents.pages} pages")


def _not_yet(index: int, data: object) -> None:
    raise AssertionError("pages are put while the file is written")

"""One memory for the pages of several models, which notices a slab that two of them use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmos.drivers.null.pages import Pages, page_size
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument

SLABS = 32
DEFAULT_PAGES = 4096  # of the first model


class SharedMemory:
    """``slabs`` of ``slab_bytes`` each, and the model whose pages were last put into each."""

    def __init__(self, bytes: int, largest_page: int) -> None:
        self.slab_bytes = max(largest_page, bytes // SLABS)
        self.slabs = bytes // self.slab_bytes
        self.models = [""] * self.slabs
        self.memory = memoryview(bytearray(self.slabs * self.slab_bytes))

    def slab_pages(self, request: LoadRequest) -> int:
        """How many pages of a model fit in a slab; InvalidArgument where none does."""
        size = page_size(request.page_tokens)
        if size > self.slab_bytes:
            raise InvalidArgument(
                f"a page of {request.model!r} has {size} bytes, and a slab of the shared arena"
                f" {self.slab_bytes}: make the arena larger, or load this model first"
            )
        return self.slab_bytes // size


def shared_bytes(request: LoadRequest) -> int:
    """The size of the memory that the first model asks for."""
    size = page_size(request.page_tokens)
    bytes = request.arena_bytes or (request.pages or DEFAULT_PAGES) * size
    if bytes < size:
        raise InvalidArgument(f"a shared arena of {bytes} bytes holds no page of {size}")
    return bytes


class SlabPages(Pages):
    """The pages of one model in a shared memory: ``slab * slab_pages + j``."""

    def __init__(self, shared: SharedMemory, model: str, page_tokens: int) -> None:
        super().__init__(0, page_tokens)
        self._shared = shared
        self._model = model
        self._slab_pages = shared.slab_bytes // self.size

    def __getitem__(self, page: int) -> memoryview:
        slab, index = divmod(page, self._slab_pages)
        start = slab * self._shared.slab_bytes + index * self.size
        return self._shared.memory[start : start + self.size]

    def give(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._shared.models[page // self._slab_pages] = self._model

    def write(
        self, table: Sequence[int], tokens: Sequence[int], start: int, stop: int, salt: int = 0
    ) -> None:
        self._own(table[start // self.page_tokens : -(-stop // self.page_tokens)])
        super().write(table, tokens, start, stop, salt)

    def check(self, table: Sequence[int], tokens: Sequence[int], salt: int = 0) -> None:
        self._own(table[: -(-len(tokens) // self.page_tokens)])
        super().check(table, tokens, salt)

    def _own(self, pages: Sequence[int]) -> None:
        for page in pages:
            owner = self._shared.models[page // self._slab_pages]
            if owner != self._model:
                raise InvalidArgument(f"page {page} of {self._model!r} is in a slab that {owner!r} was given")

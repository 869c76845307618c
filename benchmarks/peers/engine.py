"""This project's JAX driver as a measured engine: ``... MODEL DTYPE SLOTS TOTAL``."""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks.engine import Session
from benchmarks.peers.worker import prompt, serve
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.messages import Chunk, LoadRequest, Start

PAGE, CHUNK = 16, 512


class Engine:
    """The driver under quanta as the scheduler would send them, without the other processes."""

    def __init__(self, model: str, dtype: Any, slots: int, total: int) -> None:
        driver = JaxDriver("cpu")
        self.pages = -(-total // PAGE)
        request = LoadRequest(
            model="bench",
            source=model,
            cache=os.environ.get("LLMOS_CACHE", ""),
            dtype=dtype,
            kv_dtype=dtype,
            pages=slots * self.pages,
            page_tokens=PAGE,
            chunk_tokens=CHUNK,
            slots=slots,
            max_context=total,
        )
        loaded = driver.load(request, lambda _: None)
        self.session, self.slots, self.total = Session(driver, loaded), list[int](), total
        print(f"attention by {loaded.attention}, loaded in {loaded.phases}", file=sys.stderr)

    def start(self, batch: int, context: int) -> None:
        starts = [self._admit(slot, context) for slot in range(batch)]
        chunks = [
            Chunk(slot * -(-context // CHUNK) + at // CHUNK, slot, at, min(CHUNK, context - at))
            for slot in range(batch)
            for at in range(0, context, CHUNK)
        ]
        self._drop()
        self.slots = list(range(batch))
        self.session.run(len(chunks), start=starts, chunks=chunks)
        self.session.run(1, decode=self.slots)

    def decode(self, steps: int) -> None:
        self.session.run(steps, decode=self.slots)

    def prefill(self, tokens: int) -> None:
        self._drop()
        self.slots = [0]
        chunks = [Chunk(i, 0, at, min(CHUNK, tokens - at)) for i, at in enumerate(range(0, tokens, CHUNK))]
        self.session.run(len(chunks), start=[self._admit(0, tokens)], chunks=chunks)

    def _drop(self) -> None:
        if self.slots:
            self.session.run(1, release=self.slots)
        self.slots = []

    def _admit(self, slot: int, context: int) -> Start:
        pages = list(range(slot * self.pages, (slot + 1) * self.pages))
        return Start(slot=slot, tokens=prompt(context, slot), prompt=context, pages=pages, limit=self.total)


if __name__ == "__main__":
    serve(lambda: Engine(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))

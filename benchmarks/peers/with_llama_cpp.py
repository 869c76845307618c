"""llama.cpp through its C interface as a measured engine: ``... MODEL.gguf DTYPE SLOTS TOTAL``."""

from __future__ import annotations

import os
import sys
from typing import Any

import llama_cpp as api
import numpy as np

from benchmarks.peers.worker import prompt, serve


class LlamaCpp:
    """Many sequences in one context, all in one batch per step; greedy; its own defaults otherwise."""

    def __init__(self, model: str, slots: int, total: int) -> None:
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.total, self.held = total, 0
        self.context: Any = None
        self.batch = api.llama_batch_init(max(slots, 512), 0, 1)
        self.last: list[int] = []
        self.place = 0

    def start(self, batch: int, context: int) -> None:
        self._open(batch)
        self.last = []
        for row in range(batch):
            tokens = prompt(context, row)
            for at in range(0, context, 512):
                part = tokens[at : at + 512]
                last = self._run([(token, at + i, row) for i, token in enumerate(part)], [len(part) - 1])
            self.last += last
        self.place = context
        self.decode(1)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            cells = [(token, self.place, row) for row, token in enumerate(self.last)]
            self.last = self._run(cells, list(range(len(cells))))
            self.place += 1

    def prefill(self, tokens: int) -> None:
        self._open(1)
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        for at in range(0, tokens, 512):
            part = prompt(tokens)[at : at + 512]
            self._run([(token, at + i, 0) for i, token in enumerate(part)], [len(part) - 1])

    def _open(self, sequences: int) -> None:
        """A context for so many sequences; a new one only where the number changes."""
        if self.context and self.held == sequences:
            api.llama_memory_clear(api.llama_get_memory(self.context), True)
            return
        if self.context:
            api.llama_free(self.context)
        params = api.llama_context_default_params()
        params.n_ctx = sequences * -(-self.total // 256) * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = 512, 512, sequences
        params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
        self.context, self.held = api.llama_init_from_model(self.model, params), sequences

    def _run(self, cells: list[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        """Feed (token, position, sequence) cells; the likeliest tokens after the ``wanted`` ones."""
        batch: Any = self.batch
        batch.n_tokens = len(cells)
        for i, (token, position, row) in enumerate(cells):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = row, i in wanted
        if api.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        return [int(np.argmax(self._logits(i))) for i in wanted]

    def _logits(self, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, index), (self.vocab,))


if __name__ == "__main__":
    serve(lambda: LlamaCpp(sys.argv[1], int(sys.argv[3]), int(sys.argv[4])))

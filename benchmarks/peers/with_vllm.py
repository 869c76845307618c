"""vLLM for CPUs as a measured engine: ``... FOLDER DTYPE SLOTS TOTAL``; one process, no server."""

from __future__ import annotations

import os
import sys

from benchmarks.peers.worker import prompt, serve

threads = int(os.environ["OMP_NUM_THREADS"])
cores = sorted(os.sched_getaffinity(0))[:threads]
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "3"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams  # noqa: E402  (it reads the environment when imported)


class Vllm:
    """Steps of its engine, without its server; no prefix cache, so that a prompt is computed each time."""

    def __init__(self, folder: str, dtype: str, slots: int, total: int) -> None:
        self.total, self.made, self.held = total, 0, list[str]()
        self.engine = LLM(
            model=folder,
            dtype=dtype,
            max_model_len=total,
            max_num_seqs=slots,
            max_num_batched_tokens=max(total, 2048),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        ).llm_engine

    def start(self, batch: int, context: int) -> None:
        self._drop()
        for row in range(batch):
            self._add(context, row, self.total - context - 1)
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
        self.decode(1)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    def prefill(self, tokens: int) -> None:
        self._drop()
        self._add(tokens, 0, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.held.clear()

    def _add(self, tokens: int, row: int, limit: int) -> None:
        self.made += 1
        self.held.append(str(self.made))
        params = SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True, detokenize=False)
        self.engine.add_request(self.held[-1], {"prompt_token_ids": prompt(tokens, row)}, params)

    def _drop(self) -> None:
        if self.held:
            self.engine.abort_request(self.held)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.held.clear()


if __name__ == "__main__":
    serve(lambda: Vllm(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))

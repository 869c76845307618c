"""transformers on torch as a measured engine: ``... MODEL.gguf DTYPE ...``, or ``... export FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers.worker import prompt, serve


def export(model: str, folder: str) -> None:
    """Write a GGUF file's model as safetensors; what was read from GGUF refuses to be saved as it is."""
    read = load(model, "float32")
    plain = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    del plain.config.quantization_config
    plain.save_pretrained(folder)


def load(model: str, dtype: str) -> Any:
    """The model of a GGUF file, its weights dequantized."""
    file = Path(model)
    found = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, dtype)
    )
    return found.eval()


class Torch:
    """Greedy decoding with a growing cache, as ``generate`` does it."""

    def __init__(self, model: str, dtype: str) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.model = load(model, dtype)
        self.past: Any = None
        self.last: Any = None

    @torch.inference_mode()
    def _feed(self, tokens: Any) -> None:
        result = self.model(tokens, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.last = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)

    def start(self, batch: int, context: int) -> None:
        self.past = None
        self._feed(torch.tensor([prompt(context, row) for row in range(batch)]))
        self.decode(1)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._feed(self.last)
            self.last.tolist()

    def prefill(self, tokens: int) -> None:
        self.past = None
        self._feed(torch.tensor([prompt(tokens)]))


if __name__ == "__main__":
    if sys.argv[2] == "export":
        export(sys.argv[1], sys.argv[3])
    else:
        serve(lambda: Torch(sys.argv[1], sys.argv[2]))

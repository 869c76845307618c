"""A whole system without a model: every process is real, tokens are bytes, and the null driver makes them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmos.drivers.null.driver import next_token
from llmos.services.models.tokenizer import BYTES
from tests.services.models.gguf_file import METADATA, write_gguf
from tests.system.conftest import Running, booted, free_port

MODEL, DRIVER = "bytes", "driver.null0"
PAGE = 16
MERGED = "".join(list(BYTES)[:2])
# As many tokens as the null driver has; a tokenizer must have a merge: it takes the place of a byte.
VOCABULARY = {
    "tokenizer.ggml.tokens": [*list(BYTES)[:-1], MERGED],
    "tokenizer.ggml.merges": [" ".join(list(BYTES)[:2])],
    "tokenizer.ggml.token_type": [1] * len(BYTES),
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


@contextmanager
def small_system(driver: str = "", model: str = "", folder: Path | None = None) -> Iterator[Running]:
    """Boot one; ``driver`` are options of the null driver, ``model`` lines of the model's table."""
    folder = folder or Path(tempfile.mkdtemp(prefix="llmos-"))
    source = write_gguf(folder / "bytes.gguf", {**METADATA, **VOCABULARY})
    port = free_port()
    (folder / "llmos.toml").write_text(
        f"restarts = 1000\n[gateway]\nport = {port}\n"
        f'[[drivers]]\nname = "null0"\nkind = "null"\n'
        f"options = {{ {driver} }}\n"
        f'[[models]]\nname = "{MODEL}"\ndriver = "null0"\nsource = "{source}"\n'
        f"page_tokens = {PAGE}\n{model}\n"
    )
    own = {f"LLMOS_{name.upper()}": str(folder / name) for name in ("run", "state", "cache")}
    with booted(Running(folder, port, {**os.environ, **own})) as running:
        yield running


def said(prompt: list[int], count: int) -> list[int]:
    """What the null driver generates after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]

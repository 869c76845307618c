"""A model in pipeline stages computes what it computes on one device, whatever its layers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

OnMesh = Callable[..., Any]

CASES = {
    "llama": ("llama", {"pipeline": 2}),
    "tied-embedding": ("gemma2", {"pipeline": 2}),
    "learned-positions": ("gpt2", {"pipeline": 2}),
    "uneven-windows": ("gemma3", {"pipeline": 4}),
    "experts-on-one-stage": ("qwen3_moe", {"pipeline": 2}),
    "tensor": ("llama", {"pipeline": 2, "tensor": 2}),
    "expert": ("mixtral", {"pipeline": 2, "expert": 2}),
    "sequence": ("mistral", {"pipeline": 2, "sequence": 2}),
}


@pytest.mark.parametrize(("name", "mesh"), CASES.values(), ids=CASES)
def test_tokens_and_logits_are_those_of_one_device(on_mesh: OnMesh, name: str, mesh: dict[str, int]) -> None:
    on_mesh(name, mesh).check()

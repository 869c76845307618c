"""8-bit weights and pages over a mesh: what one device computes with the same values and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param("llama", {"tensor": 2}, marks=pytest.mark.slow, id="dense"),
        pytest.param("mixtral", {"expert": 2, "tensor": 2}, id="sparse"),
    ],
)
def test_a_mesh_gives_what_one_device_gives(
    on_mesh: Callable[..., Any], name: str, axes: dict[str, int]
) -> None:
    precision = {"weights": "int8", "kv_dtype": "int8"}
    tokens, logits = on_mesh(name, {}, **precision).run()
    other, found = on_mesh(name, axes, **precision).run()
    np.testing.assert_allclose(found, logits, atol=2e-4)
    assert other == tokens

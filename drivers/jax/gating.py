"""Whether a gated MLP's first product and its gate are one kernel (``gate_kernel``), and how it is cut."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llmos.drivers.jax.config import Activation

_LOG = logging.getLogger("llmos")

ROWS = 128  # of a tile, half of them for each warpgroup that multiplies
DEPTH = 64  # of a step along the inputs: 128 bytes, as wide as a swizzle can be
STAGES = 4  # as many steps are fetched ahead as shared memory holds
FETCH = 24  # what fetching a tile's rows costs, in outputs
WIDTHS = (128, 112, 96, 80, 64, 48, 32)  # of a tile, in outputs
LEAST_ROWS = 256  # fewer wait for the weights in any case
LEAST_WEIGHT = 1 << 26  # numbers; smaller ones XLA's product and gate take less time for
MULTIPROCESSORS = 132
ACTIVATIONS = ("silu", "gelu_tanh")  # those that Mosaic knows the functions of

_lock = threading.Lock()
_state = ""


@dataclass(frozen=True)
class Tiling:
    """Tiles of ``ROWS`` x ``width`` for each block, with ``depth`` steps along the inputs.

    The ``cluster`` blocks that go together take neighbouring rows; so many ``clusters`` walk over
    ``across`` x ``along`` such tiles.
    """

    width: int
    cluster: int
    across: int
    along: int
    depth: int
    clusters: int

    @property
    def chained(self) -> bool:
        """Whether a block fetches for its next tile while it finishes one.

        So every one must have two, and each tile must begin at the first stage.
        """
        tiles = self.across * self.along
        return tiles // self.clusters > 1 and self.depth % STAGES == 0


def tiling(rows: int, inner: int, hidden: int) -> Tiling | None:
    """How the product of [rows, hidden] and [2 inner, hidden] is cut, or None where the kernel does not fit.

    Of the widths the one with the least work for the block that has most: a tile's rows are fetched for few
    outputs as for many.
    """
    widths = [width for width in WIDTHS if inner % width == 0]
    if rows < LEAST_ROWS or rows % ROWS or hidden % DEPTH or not widths:
        return None
    cluster = 2 if rows % (2 * ROWS) == 0 else 1
    across, places = rows // (ROWS * cluster), MULTIPROCESSORS // cluster

    def turns(width: int) -> int:
        return -(-across * (inner // width) // places)

    width = min(widths, key=lambda width: turns(width) * (width + FETCH))
    along = inner // width
    clusters = -(-across * along // turns(width))
    return Tiling(width, cluster, across, along, hidden // DEPTH, clusters)


def enable(device: Any) -> bool:
    """Make the kernel ready for such devices: whether it is, after a trial, for Mosaic is still moving."""
    global _state
    if str(getattr(device, "compute_capability", "")) != "9.0":
        return False
    with _lock:
        if not _state:
            _state = _trial(device)
            if _state != "ready":
                _LOG.warning("gates are computed apart from their products: %s", _state)
    return _state == "ready"


def _trial(device: Any) -> str:
    """ "ready" if a small product is what XLA makes of it, or what went wrong."""
    keys = jax.device_put(jax.random.split(jax.random.key(0)), device)
    x, weight = (jax.random.normal(key, (LEAST_ROWS, 256), jnp.bfloat16) for key in keys)
    try:
        made = jax.jit(partial(product, activation="silu"))(x, weight).astype(jnp.float32)
    except Exception as problem:  # noqa: BLE001 - what a compiler says that does not know the device
        return str(problem)
    gate, up = jnp.split(jnp.matmul(x, weight.T, preferred_element_type=jnp.float32), 2, axis=-1)
    wanted = jax.nn.silu(gate) * up
    error = float(jnp.linalg.norm(made - wanted) / jnp.linalg.norm(wanted))
    return "ready" if error < 0.01 else f"the kernel's results are off by {error:.3f}"


def suits(x: jax.Array, weight: jax.Array, activation: Activation) -> bool:
    """Whether the kernel multiplies ``x`` [rows, hidden] by ``weight`` [2 inner, hidden] and gates."""
    if _state != "ready" or activation not in ACTIVATIONS or not x.dtype == weight.dtype == jnp.bfloat16:
        return False
    return weight.size >= LEAST_WEIGHT and tiling(x.shape[0], weight.shape[0] // 2, x.shape[1]) is not None


def product(x: jax.Array, weight: jax.Array, activation: Activation) -> jax.Array:
    """See ``gate_kernel.product``, which takes half a second to import."""
    from llmos.drivers.jax import gate_kernel

    return gate_kernel.product(x, weight, activation)

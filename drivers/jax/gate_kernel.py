"""The first product of a gated MLP and its gate in one Mosaic GPU kernel, for many rows on Hopper.

XLA writes gates and values [rows, 2 inner] and reads them again to gate them. Here a tile of both stays in
registers until it is gated. Blocks stay on their multiprocessor and walk over the tiles along a snake, so
that those which run at the same time share rows and weights; one warpgroup fetches, two multiply. The blocks
of a cluster take neighbouring rows of the same outputs and fetch the weights once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llmos.drivers.jax.gating import DEPTH, ROWS, STAGES, Tiling, tiling
from llmos.drivers.jax.modules import struct

Gate = Callable[[jax.Array], jax.Array]
SNAKE = 8  # tiles side by side, before the walk turns
_LOG2E = math.log2(math.e)
_GELU = math.sqrt(8.0 / math.pi)  # tanh(x) = 2 sigmoid(2 x) - 1
_STEADY, _START, _STOP = (
    int(state)
    for state in (plgpu.PipelinePipeline.STEADY, plgpu.PipelinePipeline.START, plgpu.PipelinePipeline.STOP)
)


def _sigmoid(x: jax.Array) -> jax.Array:
    """By two instructions, to 22 bits: a division takes as long as the rest of a tile's end."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * -_LOG2E))
    return root * root


GATES: dict[str, Gate] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu_tanh": lambda x: x * _sigmoid(_GELU * (x + 0.044715 * x * x * x)),
}


@partial(jax.jit, static_argnames=("activation", "interpret"))  # so that layers share what is lowered
def product(x: jax.Array, weight: jax.Array, activation: str, interpret: Any = None) -> jax.Array:
    """``act(x @ gate.T) * (x @ up.T)`` [rows, inner] of x [rows, hidden], summed and gated in float32.

    ``weight`` [2 inner, hidden] holds the rows of ``gate`` and then those of ``up``.

    Raises ValueError where ``tiling`` knows no way.
    """
    inner = weight.shape[0] // 2
    tile = tiling(x.shape[0], inner, x.shape[1])
    if tile is None:
        raise ValueError(f"x {x.shape} and weight {weight.shape} cannot be cut into tiles")
    made: jax.Array = plgpu.kernel(
        partial(_kernel, tile, GATES[activation]),
        out_type=struct((x.shape[0], inner), x.dtype),
        grid=(tile.clusters,),
        grid_names=("grid",),
        cluster=(tile.cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret,
    )(x, weight.reshape(2, inner, x.shape[1]))
    return made


def _kernel(tile: Tiling, gate: Gate, x: Any, weight: Any, out: Any) -> None:
    """x [rows, hidden], weight [2, inner, hidden] and out [rows, inner], all in the device's memory."""
    part = 64 if tile.width % 64 == 0 else tile.width  # of a tile's outputs, written at a time
    parts = tile.width // part
    slots = min(2, parts)
    pipeline = partial(_pipeline, tile)
    nothing = pipeline(lambda *_: None, lambda _: None, None)

    @partial(
        pl.run_scoped,
        stages=nothing.get_allocations(x, weight),
        written=plgpu.SMEM((2, slots, ROWS // 2, part), x.dtype, transforms=_layout(part)),
        collective_axes="warpgroup",
    )
    def _block(stages: Any, written: Any) -> None:
        mine = pl.ds(lax.axis_index("warpgroup") * (ROWS // 2), ROWS // 2)

        @plgpu.nd_loop((tile.across * tile.along,), collective_axes="grid")
        def _walk(walk: Any) -> None:
            across, along = plgpu.planar_snake(
                walk.index[0], (tile.across, tile.along), 1, min(SNAKE, tile.along)
            )
            rows = pl.ds((across * tile.cluster + lax.axis_index("cluster")) * ROWS, ROWS)
            outputs = pl.ds(along * tile.width, tile.width)

            def write(gated: jax.Array) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for index in range(parts):
                    slot = written.at[lax.axis_index("warpgroup"), index % slots]
                    columns = slice(index * part, (index + 1) * part)
                    if index >= slots:
                        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                    slot[...] = gated[:, columns]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(slot, out.at[rows, outputs].at[mine, columns])

            def finish(run: Callable[[Any], Any]) -> None:
                sums = plgpu.ACC((ROWS // 2, tile.width), jnp.float32)
                pl.run_scoped(lambda *both: _finish(run, gate, both, write, x.dtype), sums, sums)

            def multiply(_: Any, x_stage: Any, weight_stage: Any, sums: Any) -> Any:
                for half in (0, 1):
                    turned = plgpu.transpose_ref(weight_stage.at[half], (1, 0))
                    plgpu.wgmma(sums[half], x_stage.at[mine], turned)
                plgpu.wgmma_wait(0)
                return sums

            run = pipeline(multiply, finish, _state(walk) if tile.chained else None)
            run(x.at[rows, :], weight.at[:, outputs, :], allocations=stages)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _finish(run: Any, gate: Gate, sums: Any, write: Callable[[jax.Array], None], dtype: Any) -> None:
    run(sums)
    write((gate(sums[0][...]) * sums[1][...]).astype(dtype))


def _pipeline(tile: Tiling, multiply: Any, finish: Any, state: Any) -> Any:
    """Steps along the inputs: rows, and as many gates as values, ``STAGES`` steps ahead."""
    return plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(tile.depth,),
        memory_registers=40,
        in_specs=[
            plgpu.BlockSpec(
                (ROWS, DEPTH), lambda step: (0, step), transforms=_layout(DEPTH), memory_space=plgpu.SMEM
            ),
            plgpu.BlockSpec(
                (2, tile.width, DEPTH),
                lambda step: (0, 0, step),
                transforms=_layout(DEPTH),
                memory_space=plgpu.SMEM,
                collective_axes=("cluster",) if tile.cluster > 1 else (),
            ),
        ],
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=STAGES,
        compute_context=finish,
        pipeline_state=state,
    )


def _state(walk: Any) -> jax.Array:
    """Whether a block is at its first, a middle or its last tile."""
    last = jnp.where(walk.local_index == walk.num_local_steps - 1, _STOP, _STEADY)
    return jnp.where(walk.local_index == 0, _START, last)


def _layout(columns: int) -> tuple[Any, ...]:
    """How bfloat16 of so many columns lie in shared memory."""
    swizzle = plgpu.find_swizzle(columns * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

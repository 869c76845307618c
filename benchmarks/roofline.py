"""What bounds the serving figures: the matrix products of a model alone, as fast as the device sustains them.

    python -m benchmarks.roofline --model benchmarks/shapes/llama-3.1-8b.json [--rows 8192 256 1] \
        [--weights float8 [--way native] [--product lt]] [--json FILE]

The products of all layers run one after another on random bfloat16 numbers, with nothing between them but,
where ``--weights`` are of 8 bits and are multiplied so, the quantisation of what they are fed with, for
``--seconds``. The first and the last rate differ where the device lowers its clock to keep within its power:
what a queue of requests meets is the last. ``bound`` is what that rate would allow without attention, norms,
sampling and everything else a step needs. ``--way`` replaces the one that ``quant.choose`` picks.

``--product`` says who multiplies on a GPU: whoever does in the driver (``own``), what XLA finds fastest among
its Triton kernels and cuBLASLt's (``tuned``, XLA's default), or cuBLASLt with an algorithm that is timed
(``lt``) or that its heuristic picks (``lt-untimed``).
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import jax
import jax.numpy as jnp
import msgspec

from benchmarks.report import Report, arguments
from llmos.drivers.jax import platform
from llmos.drivers.jax.decoder import quant
from llmos.drivers.jax.decoder.layers import product
from llmos.drivers.sdk.messages import PRECISIONS, Precision

Weight = tuple[jax.Array, jax.Array | None]
"""Values [out, in], and the scale [out] of quantised ones."""
Product = Literal["own", "tuned", "lt", "lt-untimed"]

NO_TRITON = {"xla_gpu_enable_triton_gemm": False}
OPTIONS: dict[Product, dict[str, Any]] = {
    "tuned": {"xla_gpu_enable_triton_gemm": True},
    "lt": NO_TRITON,
    "lt-untimed": NO_TRITON | {"xla_gpu_autotune_level": 0},
}


def shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(out, in) of the fused products of one layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    fused = (heads + 2 * config["num_key_value_heads"]) * head
    inner = config["intermediate_size"]
    return [(fused, hidden), (hidden, heads * head), (2 * inner, hidden), (hidden, inner)]


def layer(weights: list[Weight], x: jax.Array) -> jax.Array:
    """The products of a layer, each fed with what the one before made."""
    for weight, scale in weights:
        x = product(x[:, : weight.shape[1]], weight, scale=scale)
    return x


@partial(jax.jit, static_argnums=(1, 2))
def make(key: jax.Array, shape: tuple[int, int], precision: Precision) -> Weight:
    """A random weight."""
    drawn = jax.random.normal(key, shape, jnp.bfloat16) * shape[1] ** -0.5
    return (drawn, None) if precision == "same" else quant.quantise(drawn, quant.DTYPES[precision])


def sustain(
    config: dict[str, Any], rows: int, seconds: float, precision: Precision, by: Product = "own"
) -> dict[str, float]:
    """Rates of the products for ``rows`` tokens at a time, in TFLOP/s, at the start and at the end."""
    keys = jax.random.split(jax.random.key(0), 5)
    weights = [make(key, shape, precision) for key, shape in zip(keys, shapes(config))]

    def run(weights: list[Weight], x: jax.Array) -> jax.Array:
        for _ in range(config["num_hidden_layers"]):
            x = layer(weights, x)
        return x

    x = jax.random.normal(keys[4], (rows, config["hidden_size"]), jnp.bfloat16)
    jax.block_until_ready((weights, x))
    options = OPTIONS.get(by) or platform.compiler_options(jax.devices()[0], rows)
    begun = time.perf_counter()
    program = jax.jit(run).lower(weights, x).compile(options)
    compiled = time.perf_counter() - begun
    program(weights, x).block_until_ready()
    work = 2e-12 * rows * config["num_hidden_layers"] * sum(weight.size for weight, _ in weights)
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        results = [program(weights, x) for _ in range(min(64, max(1, round(20 / work))))]
        results[-1].block_until_ready()
        rates.append(work * len(results) / (time.perf_counter() - begun))
    return {
        "compile_s": round(compiled, 1),
        "first_tflops": round(rates[0], 1),
        "last_tflops": round(rates[-1], 1),
        "pass_ms": round(work / rates[-1] * 1e3, 2),
        "bound_tokens_per_s": round(rows * rates[-1] / work),
    }


def main() -> None:
    parser = arguments("Rate of a model's matrix products alone.")
    parser.add_argument("--model", type=Path, required=True, help="config.json of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 256], help="tokens at a time")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--weights", default="same", choices=PRECISIONS)
    parser.add_argument("--way", choices=get_args(quant.Way))
    parser.add_argument("--product", default="own", choices=get_args(Product))
    options = parser.parse_args()
    config = msgspec.json.decode(options.model.read_bytes())
    report = Report("roofline")
    with mock.patch.object(quant, "choose", (lambda *_: options.way) if options.way else quant.choose):
        for rows in options.rows:
            report.figures[str(rows)] = sustain(
                config, rows, options.seconds, options.weights, options.product
            )
    made = {"weights": options.weights, "way": options.way or "own", "product": options.product}
    report.environment = {"device": jax.devices()[0].device_kind, "model": str(options.model), **made}
    report.write(options.json)


if __name__ == "__main__":
    main()

"""Which backend attends: the fastest that the device and a model's shapes allow, or the one asked for."""

from __future__ import annotations

from typing import Any

import jax

from llmos.drivers.jax.attention.backend import AttentionBackend
from llmos.drivers.jax.decoder.config import DecoderConfig
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument

_NATIVE_KV = ("float32", "bfloat16")


def page_bytes(config: DecoderConfig, page_tokens: int, dtype: Any) -> int:
    """Bytes of one page of one layer, scales included; all backends lay pages out alike."""
    from llmos.drivers.jax.attention.xla import XlaAttention

    layer, *_ = jax.eval_shape(lambda: XlaAttention().allocate(config, 1, page_tokens, dtype))
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(layer))


def select(
    name: str, platform: str, config: DecoderConfig, request: LoadRequest, kernels: bool = False
) -> AttentionBackend:
    """The backend called ``name``, or with "auto" the fastest that this device and these shapes allow.

    ``kernels``: the CPU's native kernels are there. Where a GPU or TPU gets XLA's attention, the name says
    why.
    """
    from llmos.drivers.jax.attention.xla import XlaAttention

    if name in ("auto", "native") and platform == "cpu" and kernels and request.kv_dtype in _NATIVE_KV:
        from llmos.drivers.jax.attention.native import HEAD_MULTIPLE, NativeAttention

        if config.head_dim % HEAD_MULTIPLE == 0:
            return NativeAttention(tokens_in_flight=2048)
    if name == "native":
        raise InvalidArgument(
            "attention backend native needs a CPU, a compiler, pages in float32 or bfloat16, and head_dim a "
            "multiple of 16"
        )
    if name not in ("auto", "pallas", "tpu", "xla"):
        raise InvalidArgument(f"no attention backend {name!r}; there is: auto, native, pallas, tpu, xla")
    best = {"gpu": "pallas", "cuda": "pallas", "tpu": "tpu"}.get(platform, "xla") if name == "auto" else name
    if best == "xla":
        return XlaAttention(tokens_in_flight=2048 if platform == "cpu" else 8192)
    wanted = _pallas_wants(platform, request) if best == "pallas" else _tpu_wants(platform, config, request)
    if wanted and name != "auto":
        raise InvalidArgument(f"attention backend {name} needs {wanted}")
    if wanted:
        return XlaAttention(tokens_in_flight=8192, name=f"xla ({best} needs {wanted})")
    if best == "tpu":
        from llmos.drivers.jax.attention.tpu import TpuAttention

        return TpuAttention()
    from llmos.drivers.jax.attention.pallas import PallasAttention

    return PallasAttention()


def _pallas_wants(platform: str, request: LoadRequest) -> str:
    """What the kernels for GPUs would need and do not find, in words; nothing if they can be used."""
    tokens = request.page_tokens
    if platform not in ("gpu", "cuda"):
        return f"a GPU, here is {platform}"
    if request.dtype != "bfloat16":
        return f"dtype bfloat16, asked for is {request.dtype}"
    if tokens & (tokens - 1) or tokens < 16:
        return f"page_tokens that are a power of two from 16 on, asked for is {tokens}"
    return ""


def _tpu_wants(platform: str, config: DecoderConfig, request: LoadRequest) -> str:
    """As ``_pallas_wants``, of the kernel for TPUs."""
    if platform != "tpu":
        return f"a TPU, here is {platform}"
    if request.mesh:
        return "a model on one device"
    from llmos.drivers.jax.attention import tpu

    return tpu.wants(config, request.dtype, request.kv_dtype)

"""What this driver cannot do is refused before anything is read."""

from __future__ import annotations

from typing import Any

import msgspec

from llmos.drivers.jax.loading.parameters import DTYPES
from llmos.drivers.jax.paging import sharing
from llmos.drivers.sdk.messages import LoadRequest
from llmos.ipc.errors import InvalidArgument

FLOAT8_CAPABILITY = (8, 9)


def check_request(request: LoadRequest) -> None:
    """Refuse what this driver cannot do, before anything is read."""
    sharing.check_request(request)
    if request.dtype not in DTYPES:
        raise InvalidArgument(
            f"dtype {request.dtype} is not one of {', '.join(DTYPES)}: it is what is computed in; "
            f'ask for 8-bit weights by weights = "{request.dtype}"'
        )
    ranges = {"page_tokens": (1, 1024), "slots": (1, 4096), "chunk_tokens": (1, 65536), "pages": (0, 1 << 24)}
    ranges |= {"host_pages": (0, 1 << 28), "disk_pages": (0, 1 << 28)}
    ranges |= {"host_bytes": (-1, 1 << 50), "disk_bytes": (0, 1 << 50)}
    for name, (low, high) in {**ranges, "max_context": (2, 1 << 22)}.items():
        if not low <= getattr(request, name) <= high:
            raise InvalidArgument(f"{name} is {getattr(request, name)}, not in {low}..{high}")
    if request.speculation == "draft" and not request.draft:
        raise InvalidArgument("speculation by a draft model needs one: set draft to its source")
    if not 0 <= request.speculation_tokens <= 32:
        raise InvalidArgument(f"speculation_tokens is {request.speculation_tokens}, not in 0..32")
    if not 0.0 < request.memory_fraction <= 1.0:
        raise InvalidArgument(f"memory_fraction is {request.memory_fraction}, not in 0..1")


def unguessed(request: LoadRequest) -> LoadRequest:
    """The request for a model in pipeline stages, which do not guess; refused if guesses were asked for."""
    if request.speculation in ("ngram", "draft"):
        raise InvalidArgument(
            f'a model in pipeline stages does not speculate: set speculation = "off" instead of '
            f'"{request.speculation}", or use another axis of the mesh'
        )
    return msgspec.structs.replace(request, speculation="off", draft="")


def check_device(request: LoadRequest, device: Any) -> None:
    """Refuse float8 on NVIDIA GPUs that have none."""
    capability = getattr(device, "compute_capability", None) if device.platform in ("gpu", "cuda") else None
    if "float8" not in (request.weights, request.kv_dtype) or not isinstance(capability, str):
        return
    if tuple(int(part) for part in capability.split(".")) < FLOAT8_CAPABILITY:
        raise InvalidArgument(
            f"float8 needs a GPU of compute capability 8.9 (Ada, Hopper or later), and {device.device_kind} "
            f"has {capability}: use int8"
        )

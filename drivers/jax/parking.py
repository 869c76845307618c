"""Models in host memory: weights leave the device and come back as they are, a few large copies at a time.

What else a model has on its device (KV pages, the batch, what speculation remembers) is freed, and allocated
anew by the programs that did it at first. Where the device computes in RAM the weights stay where they are.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

import jax

from llmos.drivers.jax import platform
from llmos.drivers.sdk.driver import Finish, PendingMove
from llmos.drivers.sdk.messages import Moved
from llmos.ipc.errors import NoMemory

# Bytes under way at once: enough to keep the link busy, and little enough for the tokens and inputs of other
# models, which take the same way, to get through between two copies.
WINDOW_BYTES = 128 << 20

_NO_HOST_MEMORY = f"the host has not got the memory to park this model in, or {platform.PAGE_LOCKED}"


class Parkable(Protocol):
    """One replica of a decoder, or an encoder."""

    @property
    def weights(self) -> list[jax.Array]:
        """All that has to be kept."""
        ...

    @property
    def state(self) -> list[jax.Array]:
        """All else that it has on its devices."""
        ...

    def put_down(self, weights: list[jax.Array]) -> None:
        """The weights are here now; forget the rest."""
        ...

    def renew(self) -> Any:
        """Empty state on the devices; called from a worker thread."""
        ...

    def take_up(self, weights: list[jax.Array], state: Any) -> None:
        """Go on with weights on the devices and what ``renew`` made."""
        ...


class HostMemory:
    """Page-locked memory of the host, which the device copies from by itself."""

    def __init__(self) -> None:
        self._shardings: list[Any] = []

    def out(self, weights: list[jax.Array], made: list[jax.Array]) -> list[jax.Array]:
        """Copies in host memory, each shard in its own; each is in ``made`` as soon as it is begun."""
        self._shardings = [x.sharding for x in weights]
        return _carry(weights, [s.with_memory_kind("pinned_host") for s in self._shardings], made)

    def back(self, weights: list[jax.Array], made: list[jax.Array]) -> list[jax.Array]:
        """Copies where they were."""
        return _carry(weights, self._shardings, made)


class SameMemory:
    """For a device that computes in RAM: there is nothing to copy."""

    def out(self, weights: list[jax.Array], made: list[jax.Array]) -> list[jax.Array]:
        return weights

    def back(self, weights: list[jax.Array], made: list[jax.Array]) -> list[jax.Array]:
        return weights


class Parked:
    """One model that is parked, or about to be."""

    def __init__(self, replicas: Sequence[Parkable], device: Any, host: bool | None = None) -> None:
        """``device`` stands for all that the model is on; ``host`` overrides whether weights leave it."""
        leave = device.platform != "cpu" if host is None else host
        self._replicas = replicas
        self._device = device
        self._stores = [HostMemory() if leave else SameMemory() for _ in replicas]
        self._needed: Counter[Any] = Counter()

    def park(self) -> PendingMove:
        """See ``Driver.park``."""
        return self._out

    def wake(self) -> PendingMove:
        """See ``Driver.wake``."""
        return self._back

    def _out(self) -> Finish:
        began = time.perf_counter()
        near = [replica.weights for replica in self._replicas]
        with _all_or_none(_NO_HOST_MEMORY) as made:
            far = [store.out(weights, made) for store, weights in zip(self._stores, near, strict=True)]
        moved = _moved(near, far, began)

        def finish() -> Moved:
            freed = [x for replica in self._replicas for x in replica.state]
            freed += [x for before, after in zip(near, far) if before is not after for x in before]
            self._needed = _bytes_by_device(freed)
            for replica, weights in zip(self._replicas, far, strict=True):
                replica.put_down(weights)
            for x in freed:
                x.delete()
            if self._device.platform == "cpu":
                platform.trim_heap()
            return moved

        return finish

    def _back(self) -> Finish:
        began = time.perf_counter()
        if self._device.platform != "cpu":
            for device, needed in self._needed.items():
                _check_free(needed, platform.free_memory(device))
        far = [replica.weights for replica in self._replicas]
        with _all_or_none("the device has not got the memory to wake this model") as made:
            near = [store.back(weights, made) for store, weights in zip(self._stores, far, strict=True)]
            renewed = []
            for replica in self._replicas:
                renewed.append(replica.renew())
                made += jax.tree.leaves(renewed[-1])
            jax.block_until_ready(renewed)  # type: ignore[no-untyped-call]
        moved = _moved(far, near, began)

        def finish() -> Moved:
            for replica, weights, state in zip(self._replicas, near, renewed, strict=True):
                replica.take_up(weights, state)
            return moved

        return finish


@contextmanager
def _all_or_none(message: str) -> Iterator[list[jax.Array]]:
    """NoMemory where memory is short: what is in the list is given up at once, not when it is collected."""
    made: list[jax.Array] = []
    try:
        with platform.lacking(message):
            yield made
    except NoMemory:
        for x in made:
            x.delete()
        raise


def _carry(weights: list[jax.Array], shardings: list[Any], made: list[jax.Array]) -> list[jax.Array]:
    """Copies of the weights where the shardings say."""
    first = len(made)
    flying: deque[jax.Array] = deque()
    for x, sharding in zip(weights, shardings, strict=True):
        made.append(jax.device_put(x, sharding, may_alias=False))
        flying.append(made[-1])
        while sum(y.nbytes for y in flying) > WINDOW_BYTES and len(flying) > 1:
            flying.popleft().block_until_ready()
    return list(jax.block_until_ready(made[first:]))  # type: ignore[no-untyped-call]


def _moved(before: list[list[jax.Array]], after: list[list[jax.Array]], began: float) -> Moved:
    copied = [x for mine, yours in zip(before, after) if mine is not yours for x in mine]
    return Moved(sum(x.nbytes for x in copied), round((time.perf_counter() - began) * 1e6))


def _bytes_by_device(arrays: list[jax.Array]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for x in arrays:
        size = prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        found.update(dict.fromkeys(x.sharding.device_set, size))
    return found


def _check_free(needed: int, free: int) -> None:
    """NoMemory where a device that can tell has fewer bytes left."""
    if free and needed > free:
        raise NoMemory(f"waking this model takes {needed} bytes, and its device has {free} left")

"""What a system consists of: ``llmos.toml``, with a complete default for everything left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec

from llmos.drivers.sdk.messages import Arena, DType, Precision, Speculation
from llmos.ipc import codec, paths
from llmos.ipc.errors import InvalidArgument, NotFound

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?")
TIME = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)([smh])")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT_MODEL = "smollm2-135m-instruct"


class DriverSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One driver process. ``kind`` is an entry point in ``llmos.drivers``; ``command`` replaces it by any
    program that speaks the driver protocol. ``options`` are passed to the driver as they are."""

    name: str
    kind: str = "jax"
    command: list[str] = []
    options: dict[str, str | int | float | bool] = {}
    environment: dict[str, str] = {}


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model to serve. ``source`` is a path, or empty for a model that was pulled under this name.

    ``dtype`` is what is computed in; ``weights`` "int8" or "float8" holds the weights in 8 bits. ``slots``
    sequences run at once; ``pages`` of ``page_tokens`` tokens hold their KV (0: what fits), and
    ``host_pages`` in RAM and ``disk_pages`` on disk that of sequences that had to leave the device.
    ``host_cache`` and ``disk_cache`` say the latter in bytes or with a unit ("8GiB"); "auto" is half of the
    RAM that is free, and none where the device is a CPU.
    ``speculation`` and ``speculation_tokens`` are those of ``LoadRequest``; ``draft`` is the path of a
    smaller model. ``arena`` "shared" takes pages from a pool that models of the driver share; the first of
    them makes it ``arena_size`` large, in bytes or with a unit (0: as large as ``pages`` says).
    ``adapters`` maps names to folders of LoRA adapters as PEFT saves them, asked for as MODEL:NAME; up to
    ``max_adapters`` (0: as many as are named), of ranks up to ``adapter_rank``, can be loaded at once.
    ``park`` says when its weights may leave the device for RAM, until somebody asks for it: "never", under
    "pressure", when another model lacks memory, or after a time without tasks ("90s", "10m", "12h") and then
    under pressure too.
    Of an encoder ``park``, ``dtype``, ``max_context`` and ``chunk_tokens``, the tokens of a step, matter.
    """

    name: str
    driver: str = "jax0"
    source: str = ""
    dtype: DType = "float32"
    weights: Precision = "same"
    kv_dtype: DType = "float32"
    slots: int = 16
    pages: int = 512
    page_tokens: int = 16
    max_context: int = 2048
    chunk_tokens: int = 256
    mesh: dict[str, int] = {}
    host_cache: str | int = 0
    disk_cache: str | int = 0
    host_pages: int = 0
    disk_pages: int = 0
    speculation: Speculation = "off"
    speculation_tokens: int = 0
    draft: str = ""
    arena: Arena = "own"
    arena_size: str | int = 0
    adapters: dict[str, str] = {}
    max_adapters: int = 0
    adapter_rank: int = 16
    park: str = "never"


class GatewaySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where HTTP is served; ``port`` 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_body: int = 4 << 20
    max_connections: int = 1024


class SchedulerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``steps`` bounds a quantum; ``queue`` the tasks that may wait; ``share`` is the part of the slots that
    a tenant's interactive work may take while another tenant's does not wait (1.0: all, for throughput)."""

    steps: Annotated[int, msgspec.Meta(ge=1)] = 8
    queue: Annotated[int, msgspec.Meta(ge=0)] = 10_000
    share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.25


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole system. A service is restarted ``restarts`` times within ``restart_window`` seconds, then
    given up."""

    drivers: list[DriverSpec] = msgspec.field(default_factory=lambda: [DriverSpec(name="jax0")])
    models: list[ModelSpec] = msgspec.field(default_factory=lambda: [ModelSpec(name=DEFAULT_MODEL)])
    gateway: GatewaySpec = GatewaySpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    restarts: int = 5
    restart_window: float = 60.0

    def model(self, name: str) -> ModelSpec:
        for spec in self.models:
            if spec.name == name:
                return spec
        known = ", ".join(model.name for model in self.models)
        raise NotFound(f"no model {name!r} is served here; there is: {known}")


def size(text: str | int) -> int:
    """Bytes in a size as the manifest has it; -1 for "auto". InvalidArgument says what is wrong with it."""
    if text == "auto":
        return -1
    match = SIZE.fullmatch(str(text))
    if match is None:
        raise InvalidArgument(
            f'a size is bytes, or a number with KB, KiB, MB ... TiB, or "auto"; not {text!r}'
        )
    number, unit, binary = match.groups()
    power = "KMGT".index(unit) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def park_seconds(model: ModelSpec) -> float:
    """After how many seconds without tasks a model is parked; 0.0 for one that is not on account of them.
    InvalidArgument says what is wrong with ``park``."""
    if model.park in ("never", "pressure"):
        return 0.0
    match = TIME.fullmatch(model.park)
    if match is None or not float(match[1]):
        raise InvalidArgument(
            f'model {model.name!r}: park is "never", "pressure", or a time such as "90s", "10m" or "12h"; '
            f"not {model.park!r}"
        )
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def load(path: Path | None) -> Manifest:
    """The manifest in a TOML file, or the default; InvalidArgument says what is wrong and where."""
    if path is None:
        return Manifest()
    try:
        manifest = msgspec.toml.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    check(manifest)
    return manifest


def check(manifest: Manifest) -> None:
    """Refuse a manifest that cannot work, before anything is started."""
    drivers, models = [d.name for d in manifest.drivers], [m.name for m in manifest.models]
    for what, names in (("driver", drivers), ("model", models)):
        for name in names:
            if not NAME.fullmatch(name):
                raise InvalidArgument(f"{what} name {name!r}: use up to 64 letters, digits, '-', '_' and '.'")
            if names.count(name) > 1:
                raise InvalidArgument(f"two {what}s are named {name!r}")
    for model in manifest.models:
        size(model.host_cache)
        park_seconds(model)
        for name, given in (("disk_cache", model.disk_cache), ("arena_size", model.arena_size)):
            if size(given) < 0:
                raise InvalidArgument(
                    f"model {model.name!r}: say how many bytes of {name}, there is no default"
                )
        for adapter in model.adapters:
            if not NAME.fullmatch(adapter):
                raise InvalidArgument(f"adapter name {adapter!r}: use letters, digits, '-', '_' and '.'")
        if 0 < model.max_adapters < len(model.adapters):
            raise InvalidArgument(
                f"model {model.name!r} names {len(model.adapters)} adapters: raise max_adapters"
            )
        if model.driver not in drivers:
            raise InvalidArgument(f"model {model.name!r} wants driver {model.driver!r}; there is: {drivers}")


def write_running(manifest: Manifest, run: Path | None = None) -> None:
    """Leave the manifest of the running system where its services find it."""
    paths.write_private((run or paths.run_dir()) / "manifest", codec.encode(manifest))


def read_running(run: Path | None = None) -> Manifest:
    """The manifest of the running system."""
    return codec.decode(((run or paths.run_dir()) / "manifest").read_bytes(), Manifest)

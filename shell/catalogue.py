"""``llmos models``, ``load``, ``unload``, ``park``, ``wake`` and ``pull``: what there is, what is in use, and
getting more."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from llmos.drivers.sdk.messages import LoadProgress
from llmos.ipc import paths
from llmos.ipc.client import Client
from llmos.ipc.errors import HostDown, InvalidArgument
from llmos.services.adapters import split
from llmos.services.models import catalog, store
from llmos.services.models.messages import (
    Load,
    LoadAdapter,
    ModelLine,
    ModelList,
    Park,
    Unload,
    UnloadAdapter,
    Wake,
)
from llmos.services.models.store import PullProgress
from llmos.shell import session
from llmos.shell.output import count, mesh_words, say, table
from llmos.shell.progress import Bar

LOAD_SECONDS = 3600.0
UNLOAD_SECONDS = 120.0
COLUMNS = ("MODEL", "STATE", "DRIVER", "FAMILY", "PARAMETERS", "CONTEXT", "NOTE")


def models(options: argparse.Namespace) -> int:
    """What is served, then what was pulled, then what could be."""
    try:
        with session.connect() as client:
            served = list_models(client)
    except HostDown:
        served = []
        say("no system is up, so none is served; these are the models on disk")
    rows = [_served(line) for line in served]
    names = {line.name for line in served}
    pulled = [line for line in store.stored() if line.name not in names]
    rows += [(line.name, "pulled", "", "", "", "", line.reference) for line in pulled]
    names.update(line.name for line in pulled)
    rows += [
        (name, "known", "", "", "", "", f"llmos pull {name}") for name in catalog.CATALOG if name not in names
    ]
    print(table(COLUMNS, rows, right=("PARAMETERS", "CONTEXT")))
    return 0


def list_models(client: Client) -> list[ModelLine]:
    """The models that the running system serves."""
    return client.call("models.list", None, ModelList, timeout=session.ANSWER_SECONDS).models


def _served(line: ModelLine) -> tuple[str, ...]:
    note = line.error or mesh_words(line.mesh)
    if line.state == "loading":
        note = f"{line.phase} {100 * line.progress:.0f}%"
    elif line.state == "missing":
        note = f"llmos pull {line.name}"
    elif line.state == "unloaded":
        note = f"llmos load {line.name}"
    elif line.state == "parked":
        note = "the next request wakes it"
    if line.woke:
        note = f"{note}, woke in {line.woke:.2f} s".removeprefix(", ")
    parameters = count(line.parameters) if line.parameters else ""
    return line.name, line.state, line.driver, line.family, parameters, str(line.context or ""), note


def load(options: argparse.Namespace) -> int:
    """Load a model of the manifest onto its driver, or an adapter beside it, and wait until it is ready."""
    if split(options.model)[1]:
        return _load_adapter(options)
    if options.path:
        raise InvalidArgument("only an adapter, MODEL:NAME, has a path here; models are in the manifest")
    began = time.monotonic()
    with session.connect() as client:
        line = load_with_bar(client, options.model)
    say(f"model {line.name} is ready on {line.driver} after {time.monotonic() - began:.1f} s")
    return 0


def _load_adapter(options: argparse.Namespace) -> int:
    source = str(Path(options.path).expanduser().absolute()) if options.path else ""
    with session.connect() as client:
        request = LoadAdapter(options.model, source)
        line = client.call("models.load_adapter", request, ModelLine, timeout=LOAD_SECONDS)
    say(f"adapter {line.name} is ready; ask for it as a model of that name")
    return 0


def load_with_bar(client: Client, model: str) -> ModelLine:
    """Load a model while a bar shows how far it is; the model as it is listed then."""
    with Bar(f"load {model}") as bar:
        answers = client.stream("models.load", Load(model), LoadProgress, ModelLine, timeout=LOAD_SECONDS)
        for answer in answers:
            if isinstance(answer, ModelLine):
                return answer
            bar.update(answer.phase, answer.done, answer.total)
    raise HostDown(f"the load of {model} ended without an answer; see: llmos models")


def unload(options: argparse.Namespace) -> int:
    """Take a model, or an adapter, from its driver; its memory is free when this returns."""
    with session.connect() as client:
        if split(options.model)[1]:
            client.call("models.unload_adapter", UnloadAdapter(options.model), timeout=UNLOAD_SECONDS)
            say(f"adapter {options.model} is unloaded")
            return 0
        client.call("models.unload", Unload(options.model), timeout=UNLOAD_SECONDS)
    say(f"model {options.model} is unloaded; again by: llmos load {options.model}")
    return 0


def park(options: argparse.Namespace) -> int:
    """Move a model's weights to RAM; its device memory is free when this returns."""
    with session.connect() as client:
        client.call("models.park", Park(options.model), ModelLine, timeout=options.timeout)
    say(f"model {options.model} is parked; the next request wakes it, or: llmos wake {options.model}")
    return 0


def wake(options: argparse.Namespace) -> int:
    """Put a parked model back on its device, and wait until it is there."""
    with session.connect() as client:
        line = client.call("models.wake", Wake(options.model), ModelLine, timeout=LOAD_SECONDS)
    say(f"model {line.name} is {line.state} on {line.driver}; waking it took {line.woke:.2f} s")
    return 0


def pull(options: argparse.Namespace) -> int:
    """Fetch one model, and say where it is."""
    path = pull_with_bar(options.reference, name=options.name, again=options.again)
    print(path)
    return 0


def pull_with_bar(reference: str, *, name: str = "", again: bool = False) -> str:
    """Fetch a model while a bar shows how far it is; the path where it lies."""
    cache = paths.cache_dir()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Bar(f"pull {reference}", bytes=True) as bar:

        def show(progress: PullProgress) -> None:
            bar.update(progress.phase, progress.done, progress.total)

        return str(store.pull(reference, show, name=name, again=again))

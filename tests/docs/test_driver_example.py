"""The example in docs/drivers.md, installed as a package of its own, under the real scheduler."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmos.drivers.sdk.messages import LoadedModel, LoadRequest
from llmos.ipc.client import Client
from llmos.ipc.errors import NotFound
from llmos.ipc.grant import Grant
from llmos.services.manifest import DriverSpec, Manifest
from llmos.services.scheduler.messages import Finished, Host, SchedulerStats, Submit, Tokens
from tests.conftest import System

PAGE = (Path(__file__).parents[2] / "docs" / "drivers.md").read_text()
MODEL = LoadRequest(
    model="polly", source="", slots=1, pages=64, page_tokens=4, max_context=256, chunk_tokens=8
)
GRANTS = {
    "memory": Grant(principal="memory", tenant="system", serves="memory"),
    "scheduler": Grant(
        principal="scheduler", tenant="system", serves="scheduler", calls=["memory.*", "driver.parrot0.*"]
    ),
    "driver.parrot0": Grant(principal="driver.parrot0", tenant="system", serves="driver.parrot0"),
    "user": Grant(
        principal="user", tenant="a", models=["*"], calls=["scheduler.*", "kernel.names", "driver.parrot0.*"]
    ),
}


def install(folder: Path) -> None:
    """What pip would lay down for the package of the page."""
    source = re.search(r"```python\n(# parrot\.py.*?)```", PAGE, re.DOTALL)
    entry = re.search(r'\[project\.entry-points\."(.*?)"\]\n(\w+) = "(.*?)"', PAGE)
    assert source is not None
    assert entry is not None
    (folder / "parrot.py").write_text(source[1])
    info = folder / "llmos_driver_parrot-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmos-driver-parrot\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2]} = {entry[3]}\n")


@pytest.fixture
def parrot(system: Callable[[dict[str, Grant]], System]) -> System:
    net = system(GRANTS)
    folder = net.run / "site"
    folder.mkdir()
    install(folder)
    net.env["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    driver = DriverSpec(name="parrot0", kind="parrot", options={"step_ms": 2.0})
    net.write_manifest(Manifest(drivers=[driver], models=[]))
    net.kernel()
    net.spawn("memory", "llmos.services.memory")
    net.spawn("scheduler", "llmos.services.scheduler")
    net.spawn("driver.parrot0", "llmos.drivers.sdk", "parrot0")
    net.wait_ready("memory", "scheduler", "driver.parrot0")
    with net.client() as client:
        loaded = client.call("driver.parrot0.load", MODEL, LoadedModel)
        client.call("scheduler.host", Host("parrot0", loaded))
    return net


def said(client: Client, submit: Submit) -> tuple[list[int], Finished]:
    *chunks, end = client.stream("scheduler.submit", submit, Tokens, Finished)
    return [token for chunk in chunks for token in chunk.tokens], end


def test_it_repeats_the_prompt_and_ends_by_length_or_stop(parrot: System) -> None:
    client = parrot.client()
    prompt = list(range(11, 31))
    tokens, end = said(client, Submit(model="polly", tokens=prompt, max_tokens=25))
    assert (tokens, end.reason) == ([*prompt, *prompt[:5]], "length")
    tokens, end = said(client, Submit(model="polly", tokens=prompt, max_tokens=25, stop=[13]))
    assert (tokens, end.reason) == ([11, 12, 13], "stop")


def test_a_task_that_is_displaced_continues_exactly(parrot: System) -> None:
    client, other = parrot.client(), parrot.client()
    low = client.stream(
        "scheduler.submit",
        Submit(model="polly", tokens=[1, 2, 3], max_tokens=100, band="batch"),
        Tokens,
        Finished,
    )
    begun = next(low).tokens
    assert said(other, Submit(model="polly", tokens=[7], max_tokens=3))[0] == [7, 7, 7]
    rest = [token for chunk in low if isinstance(chunk, Tokens) for token in chunk.tokens]
    assert [*begun, *rest] == ([1, 2, 3] * 34)[:100]
    assert other.call("scheduler.stats", None, SchedulerStats).displaced > 0


def test_it_refuses_a_model_that_is_not_loaded(parrot: System) -> None:
    with pytest.raises(NotFound, match="no model 'molly'"):
        parrot.client().call("driver.parrot0.unload", {"model": "molly"})

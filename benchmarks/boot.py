"""Boot to first token, by phase: warm (converted weights and compiled programs are kept) and the first time.

``python -m benchmarks.boot [--json FILE]``. Each boot is ``llmos up --detach`` in a run folder of its own,
then one chat under the local user's token, as a person would wait for it. The first boot has a cache that
holds nothing but the model's files; those after it find there what the first one left. All times are in
seconds from the start of the command.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.report import Report, arguments
from llmos.ipc import paths
from llmos.ipc.client import Client
from llmos.services import manifest
from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.models import store
from llmos.services.models.messages import Chat, ChatMessage, Done, Generation, ModelList, Text
from llmos.services.supervisor import status
from llmos.shell.boot import pull_missing

GOALS = {"warm_first_token_s": 12.0, "first_time_first_token_s": 90.0, "warm_services_alone_s": 1.5}
QUESTION = "What is an operating system?"
MANIFEST = "[gateway]\nport = 0\n"


@dataclass
class Boot:
    """One boot: seconds to each milestone, what the load was made of, and what a person saw of it."""

    milestones: dict[str, float]
    load: dict[str, float]
    progress_lines: int
    longest_silence: float


def boot(cache: Path) -> Boot:
    """Boot with this cache, ask once, stop."""
    folder = Path(tempfile.mkdtemp(prefix="llmos-b"))
    run = folder / "run"
    own = {"LLMOS_RUN": str(run), "LLMOS_STATE": str(folder / "state"), "LLMOS_CACHE": str(cache)}
    environment = {**os.environ, **own}
    path = folder / "llmos.toml"
    path.write_text(MANIFEST)
    command = [sys.executable, "-m", "llmos.shell.main"]
    try:
        begun = time.time()
        lines = _start([*command, "up", "--detach", "--manifest", str(path)], environment)
        up = time.time() - begun
        with Client(paths.read_token("user", run), run=run) as client:
            first, done = _ask(client)
            load = client.call("models.list", None, ModelList).models[0].phases
        milestones = {
            **_milestones(run, begun),
            "up": up,
            "first_token": first - begun,
            "answer": done - begun,
        }
    finally:
        subprocess.run([*command, "down"], env=environment, check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)
    times = [begun, *(at for at, _ in lines), begun + up]
    silence = max(after - before for before, after in pairwise(times))
    return Boot(milestones, load, sum(line.startswith("load: ") for _, line in lines), silence)


def _start(command: list[str], environment: dict[str, str]) -> list[tuple[float, str]]:
    """Run ``llmos up`` to its end: each line that it said, and when."""
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append((time.time(), line.rstrip()))
    if process.returncode:
        sys.exit("\n".join(["llmos up failed:", *(line for _, line in lines)]))
    return lines


def _ask(client: Client) -> tuple[float, float]:
    """When the first piece of an answer came, and when it was complete."""
    generation = Generation(max_tokens=16, temperature=0.0)
    request = Chat(model=DEFAULT_MODEL, messages=[ChatMessage("user", QUESTION)], generation=generation)
    first = 0.0
    for _ in client.stream("models.chat", request, Text, end=Done):
        first = first or time.time()
    return first, time.time()


def _milestones(run: Path, begun: float) -> dict[str, float]:
    """What the supervisor wrote down; ``services_alone`` counts from its own start, the others from ours."""
    current = status.read(run)
    assert current is not None
    before = current.started - begun
    driver = next(process for process in current.processes if process.name.startswith("driver."))
    kernel, services = current.phases["kernel"], current.phases["services"]
    return {
        "kernel": before + kernel,
        "services": before + services,
        "services_alone": services,
        "driver": before + driver.ready,
    }


def fresh_cache(folder: Path) -> Path:
    """A cache that holds the pulled model and nothing else; linked where that is possible."""
    model = store.find(DEFAULT_MODEL)
    assert model is not None
    source = model.parent if model.is_file() else model
    cache = paths.private_dir(folder / "cache")

    def place(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, cache / "models" / source.name, copy_function=place)
    for each in (cache / "models", cache / "models" / source.name):
        each.chmod(0o700)
    return cache


def figures(name: str, boots: list[Boot]) -> dict[str, float]:
    """Medians over the boots, under names that begin with ``name``."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    found = {f"{name}_{key}_s": median([one.milestones[key] for one in boots]) for key in boots[0].milestones}
    for phase in boots[0].load:
        found[f"{name}_load_{phase}_s"] = median([one.load.get(phase, 0.0) for one in boots])
    found[f"{name}_progress_lines"] = median([float(one.progress_lines) for one in boots])
    found[f"{name}_longest_silence_s"] = median([one.longest_silence for one in boots])
    return found


def run(rounds: int) -> Report:
    """The first boot, then ``rounds`` warm ones with what it left in the cache."""
    pull_missing(manifest.Manifest())
    folder = Path(tempfile.mkdtemp(prefix="llmos-b"))
    try:
        cache = fresh_cache(folder)
        first = boot(cache)
        warm = [boot(cache) for _ in range(rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = Report("boot", {**figures("warm", warm), **figures("first_time", [first])})
    totals = [round(one.milestones["first_token"], 2) for one in warm]
    report.environment = {"rounds": rounds, "warm_first_token_each_s": totals, "load": os.getloadavg()[0]}
    report.ratios = {f"{key}_over_goal": round(report.figures[key] / goal, 3) for key, goal in GOALS.items()}
    return report


def main() -> None:
    parser = arguments("Boot to first token by phase, warm and the first time.")
    parser.add_argument("--rounds", type=int, default=5, help="warm boots")
    options = parser.parse_args()
    run(options.rounds).write(options.json)


if __name__ == "__main__":
    main()

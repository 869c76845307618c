"""``llmos ps``: the processes, the models they serve, and the tasks they work on."""

from __future__ import annotations

import argparse
import time

from llmos.ipc.errors import LLMOSError
from llmos.kernel.messages import Name, Names
from llmos.services.models.messages import ModelLine, ModelList
from llmos.services.scheduler.messages import TaskLine, Tasks
from llmos.services.supervisor.status import Status
from llmos.shell import session
from llmos.shell.output import say, seconds, table

PROCESSES = ("NAME", "PID", "STATE", "UP", "RESTARTS", "BEAT", "CALLS")
MODELS = ("MODEL", "STATE", "DRIVER", "WOKE IN")
TASKS = ("TASK", "TENANT", "MODEL", "BAND", "STATE", "TOKENS", "AGE", "LABEL")


def ps(options: argparse.Namespace) -> int:
    """Print the tables; a part that cannot be had is said, and the exit status is then 1."""
    status, complete = session.require_up(), True
    names: dict[str, Name] = {}
    tasks: list[TaskLine] | None = None
    models: list[ModelLine] = []
    try:
        with session.connect() as client:
            names = {line.name: line for line in client.call("kernel.names", None, Names).names}
            tasks = client.call("scheduler.tasks", None, Tasks, timeout=2.0).tasks
            models = client.call("models.list", None, ModelList, timeout=2.0).models
    except LLMOSError as error:
        complete = False
        say(f"llmos ps: {error}")
    print(process_table(status, names, time.time()))
    if models:
        print()
        print(model_table(models))
    if tasks is not None:
        print()
        print(task_table(tasks) if tasks else "no tasks")
    return 0 if complete else 1


def process_table(status: Status, names: dict[str, Name], now: float) -> str:
    """Every process of the supervisor, with what the kernel knows of it; ``now`` in Unix time."""
    rows: list[tuple[object, ...]] = [
        ("supervisor", status.pid, status.state, seconds(now - status.started), "-", "-", "-")
    ]
    for process in status.processes:
        line = names.get(process.name)
        up = now - status.started - process.spawned if process.pid else -1.0
        known = line is not None and line.connection > 0
        beat = seconds(line.beat_age) if line is not None and known else "-"
        calls = line.outstanding if line is not None and known else "-"
        rows.append(
            (process.name, process.pid or "-", process.state, seconds(up), process.restarts, beat, calls)
        )
    return table(PROCESSES, rows, right=("PID", "UP", "RESTARTS", "BEAT", "CALLS"))


def model_table(models: list[ModelLine]) -> str:
    """Every model of the manifest, and how long waking it took the last time."""
    rows = [
        (line.name, line.state, line.driver, f"{line.woke:.2f} s" if line.woke else "-") for line in models
    ]
    return table(MODELS, rows, right=("WOKE IN",))


def task_table(tasks: list[TaskLine]) -> str:
    """The scheduler's tasks."""
    rows = [
        (
            task.task,
            task.tenant,
            task.model,
            task.band,
            task.state,
            f"{task.prompt_tokens}+{task.completion_tokens}",
            seconds(task.age),
            task.label[:40],
        )
        for task in tasks
    ]
    return table(TASKS, rows, right=("TASK", "TOKENS", "AGE"))

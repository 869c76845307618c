"""What ``ps`` shows."""

from __future__ import annotations

from llmos.kernel.messages import Name
from llmos.services.scheduler.messages import TaskLine
from llmos.services.supervisor.status import ProcessStatus, Status
from llmos.shell.processes import process_table, task_table

STATUS = Status(
    pid=100,
    started=1000.0,
    state="degraded",
    processes=[
        ProcessStatus(name="kernel", state="ready", pid=101, spawned=0.0, ready=0.1),
        ProcessStatus(name="memory", state="ready", pid=102, spawned=30.0, ready=30.4, restarts=1),
        ProcessStatus(name="driver.x", state="failed", restarts=5, exit="exit status 1"),
    ],
)


def test_every_process_has_a_line_with_what_the_kernel_knows_of_it() -> None:
    names = {"memory": Name("memory", 9, 102, True, 3, 0.25, 77, 15.0)}
    lines = [line.split() for line in process_table(STATUS, names, 1090.0).split("\n")]
    assert lines[1] == ["supervisor", "100", "degraded", "1m30s", "-", "-", "-"]
    assert lines[2] == ["kernel", "101", "ready", "1m30s", "0", "-", "-"]
    assert lines[3] == ["memory", "102", "ready", "1m00s", "1", "0.2s", "3"]
    assert lines[4] == ["driver.x", "-", "failed", "-", "5", "-", "-"]


def test_a_task_shows_whose_it_is_and_how_far() -> None:
    task = TaskLine(
        task=7,
        tenant="local",
        principal="user",
        model="m",
        driver="x",
        band="interactive",
        state="running",
        prompt_tokens=12,
        completion_tokens=5,
        max_tokens=100,
        pages=2,
        age=3.21,
        label="chat",
    )
    line = task_table([task]).split("\n")[1].split()
    assert line == ["7", "local", "m", "interactive", "running", "12+5", "3.2s", "chat"]

"""``python -m llmos.shell.demo``: from nothing to a model's answer and back to nothing, in one go.

A private system in folders of its own; only the cache is shared, so that the model is fetched and compiled
once. The exit status is 0 only if the answer came and nothing was left behind.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from llmos.ipc import paths
from llmos.ipc.errors import IOFailure, LLMOSError
from llmos.services import manifest as manifests
from llmos.services.manifest import DEFAULT_MODEL
from llmos.services.models.messages import Chat, ChatMessage, Generation
from llmos.services.supervisor import control
from llmos.services.supervisor.status import Status
from llmos.shell import boot, processes, session
from llmos.shell.generate import Answer, stream
from llmos.shell.output import say

QUESTION = "What is an operating system? Answer in two sentences."
MAX_TOKENS = 96
MANIFEST = "[gateway]\nport = 0\n"


def main() -> int:
    """Run the demonstration in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="llmos-demo-") as folder:
        os.environ["LLMOS_RUN"] = f"{folder}/run"
        os.environ["LLMOS_STATE"] = f"{folder}/state"
        path = Path(folder) / "llmos.toml"
        path.write_text(MANIFEST)
        try:
            return demonstrate(path)
        except LLMOSError as error:
            say(f"demo: {error}")
            return 1
        except KeyboardInterrupt:
            return 130


def demonstrate(path: Path) -> int:
    """Boot, ask, look, stop, check."""
    boot.pull_missing(manifests.load(path))
    supervisor = control.start(path, follow=True)
    try:
        status = boot.wait_processes(supervisor, say)
        say(", ".join(f"{phase} ready after {span:.2f} s" for phase, span in status.phases.items()))
        if not boot.wait_models(supervisor):
            raise IOFailure("the model did not become ready")
        say(f"ready {time.time() - status.started:.1f} s after the start\n")
        ask()
        processes.ps(argparse.Namespace())
    finally:
        print(flush=True)
        code = boot.end(supervisor)
    left = leftovers(status)
    for what in left:
        say(f"left behind: {what}")
    if not left:
        say("no process and no socket is left")
    return 1 if code or left else 0


def ask() -> None:
    """Stream one answer to a real question, with its figures."""
    print(f"> {QUESTION}")
    generation = Generation(max_tokens=MAX_TOKENS, temperature=0.0)
    request = Chat(model=DEFAULT_MODEL, messages=[ChatMessage("user", QUESTION)], generation=generation)
    with session.connect() as client:
        answer = Answer(time.monotonic())
        for piece in stream(client, request, answer):
            print(piece, end="", flush=True)
    print(f"\n\n{answer.stats()}\n")
    if answer.done is None or not answer.text.strip():
        raise IOFailure("the model's answer is empty")


def leftovers(status: Status) -> list[str]:
    """Processes that still run and files in the run folder."""
    processes_left = [
        f"{process.name}, process {process.pid}"
        for process in status.processes
        if process.pid and Path(f"/proc/{process.pid}").exists()
    ]
    return processes_left + [str(path) for path in paths.run_dir().rglob("*")]


if __name__ == "__main__":
    sys.exit(main())

"""``llmos stop --save FILE`` and ``llmos cont FILE``: tasks that leave the system, and come back.

The system reads and writes saved tasks in a private folder of its own; here they are carried from there to
where the user wants them, and back.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from llmos.ipc.errors import InvalidArgument, IOFailure, NotFound
from llmos.services import saved
from llmos.services.models.messages import Done, Resume, Text
from llmos.services.scheduler.messages import Save, Saved
from llmos.shell import session
from llmos.shell.generate import ANSWER_SECONDS, Answer, put
from llmos.shell.output import say, size

SAVE_SECONDS = 600.0


def save(tasks: list[int], file: Path) -> int:
    """Write one task to a new file."""
    if len(tasks) != 1:
        raise InvalidArgument("a file holds one task: give one number")
    if file.exists() or not file.absolute().parent.is_dir():
        raise InvalidArgument(f"{file} must be a new file in a folder that is there")
    with session.connect() as client:
        done = client.call("scheduler.save", Save(tasks[0]), Saved, timeout=SAVE_SECONDS)
    source = saved.path_of(done.name)
    try:
        _carry(source, file)
    except OSError as error:
        raise IOFailure(f"{file}: {error.strerror}; the saved task is whole, in {source}") from None
    source.unlink()
    say(f"{file}: {size(done.bytes)}, {done.pages} pages of KV; go on by: llmos cont {file}")
    return 0


def go_on(files: list[Path], *, rest: bool) -> int:
    """Let a saved task go on, and print its answer."""
    if len(files) != 1:
        raise InvalidArgument("llmos cont takes numbers of tasks, or one file")
    if not files[0].is_file():
        raise NotFound(f"there is no file {files[0]}")
    with session.connect() as client:
        name = saved.new_name()
        try:
            _carry(files[0], saved.path_of(name))
            answer = Answer(time.monotonic())
            for chunk in client.stream("models.resume", Resume(name), Text, end=Done, timeout=ANSWER_SECONDS):
                before = not answer.first
                piece = answer.take(chunk, time.monotonic())
                put("" if rest and before else piece)
        except OSError as error:
            raise IOFailure(f"{files[0]}: {error.strerror}") from None
        finally:
            saved.path_of(name).unlink(missing_ok=True)
    put("" if answer.text.endswith("\n") else "\n")
    return 0


def _carry(source: Path, target: Path) -> None:
    """Copy a file completely or not at all, to one that only its owner may read and that was not there."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with (
            source.open("rb") as old,
            os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new,
        ):
            shutil.copyfileobj(old, new, 1 << 20)
            new.flush()
            os.fsync(new.fileno())
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)

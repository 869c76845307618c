"""What runs first in every process of the system, then becomes it.

``python -m llmos.services.supervisor.child PARENT NAME (module MODULE | exec PROGRAM) [ARGUMENT...]``

It ties its life to the supervisor's. That cannot be done between fork and exec without running Python there,
which may deadlock, so it is the first thing done after exec; whoever was orphaned before that sees another
parent and leaves.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_NO_NEW_PRIVS = 1, 15, 38
ORPHANED, CANNOT_RUN = 125, 127


def die_with(parent: int, number: signal.Signals) -> None:
    """Get a signal when the parent process dies; leave at once if it is dead already."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(ORPHANED)


def restrict(name: str) -> None:
    """Gain no privileges and dump no core: one would hold keys and prompts."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_NAME, ctypes.c_char_p(f"llmos-{name}"[:15].encode()))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


def _prctl(option: int, value: int | ctypes.c_char_p) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_ulong(value) if isinstance(value, int) else value
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def main() -> None:
    """Restrict this process and become the module or the program."""
    parent, name, kind, target, *arguments = sys.argv[1:]
    die_with(int(parent), signal.SIGKILL)
    restrict(name)
    if kind == "exec":
        try:
            os.execvp(target, [target, *arguments])
        except OSError as error:
            print(f"cannot run {target}: {error.strerror}", file=sys.stderr)
            sys.exit(CANNOT_RUN)
    sys.argv[1:] = arguments
    runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

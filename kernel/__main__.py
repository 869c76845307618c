"""``python -m llmos.kernel``: the kernel process, started by the supervisor."""

from __future__ import annotations

from llmos.ipc import codec, paths
from llmos.kernel.loop import KernelLoop
from llmos.kernel.messages import BootFile


def main() -> None:
    run = paths.run_dir()
    boot = codec.decode((run / "boot").read_bytes(), BootFile)
    KernelLoop(run, boot).run()


if __name__ == "__main__":
    main()

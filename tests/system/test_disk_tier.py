"""More contexts than the device, RAM and then the disk hold: nobody's request fails, and every one continues
exactly. The null driver refuses a sequence whose pages do not hold what they should."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from llmos.ipc.client import Client
from llmos.ipc.errors import HostDown
from llmos.ipc.grant import Band
from llmos.services.memory.messages import ArenaUsage, Usage
from llmos.services.models.messages import Complete, Detokenize, Done, Generation
from tests.conftest import wait_until
from tests.system.conftest import Running
from tests.system.small import DRIVER, MODEL, said, small_system

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SLOW_COMPUTE = "step_ms = 2.0, prefill_us = 1000.0, move_us = 200.0"  # so that pages are worth keeping
SMALL = "slots = 4\npages = 40\nhost_pages = 12\ndisk_pages = 512\nmax_context = 512"
PROMPTS = [[(17 * i + k) % 250 for k in range(96)] for i in range(24)]
COUNT = 100


def arena(client: Client) -> ArenaUsage:
    (found,) = client.call("memory.usage", None, Usage).arenas
    return found


def used(up: Running, name: str) -> int:
    """Pages in a tier that are not free."""
    with up.client() as client:
        found = arena(client)
    return next((line.total - line.free for line in (*found.tiers,) if line.tier == name), found.owned)


def ask(up: Running, prompt: list[int], band: Band = "interactive") -> Done:
    """A request of the native protocol, on a connection of its own."""
    generation = Generation(max_tokens=COUNT, temperature=0.0, ignore_eos=True, band=band)
    body = Complete(model=MODEL, prompt=prompt, generation=generation)
    with up.client() as client:
        return client.call("models.complete", body, Done)


def check(up: Running, prompt: list[int], done: Done) -> None:
    with up.client() as client:
        assert done.text == client.call("models.detokenize", Detokenize(MODEL, said(prompt, COUNT)))
    assert done.usage.completion_tokens == COUNT


def push(up: Running, disturb: Callable[[], None] = lambda: None) -> None:
    """Batch tasks, and interactive ones that displace them; every answer must be as it would be alone."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [pool.submit(ask, up, prompt, "batch") for prompt in PROMPTS[:8]]
        wait_until(lambda: used(up, "device") > 20, what="the batch tasks")
        asked += [pool.submit(ask, up, prompt) for prompt in PROMPTS[8:]]
        disturb()
        answers = [one.result() for one in asked]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        check(up, prompt, answer)


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with small_system(SLOW_COMPUTE, SMALL) as running:
        yield running


def nameless(up: Running) -> Path:
    """The driver's file of pages, which has no name but this."""
    folder = Path(f"/proc/{up.process(DRIVER).pid}/fd")
    pages = str(up.folder / "state" / "pages")
    return next(fd for fd in folder.iterdir() if str(fd.readlink()).startswith(pages))


def test_contexts_go_to_disk_and_come_back_and_the_file_tells_nothing(small: Running) -> None:
    def look() -> None:
        wait_until(lambda: any(nameless(small).read_bytes()), what="pages on disk")
        file = nameless(small)
        assert file.stat().st_mode & 0o777 == 0o600
        assert list((small.folder / "state" / "pages").iterdir()) == []
        content = file.read_bytes()
        for prompt in PROMPTS:
            assert bytes(prompt[:16]) not in content
            assert b"".join(token.to_bytes(4, "little") for token in prompt[:8]) not in content

    push(small, look)


@pytest.mark.slow
def test_a_driver_killed_while_pages_move_fails_nobody(small: Running) -> None:
    def disturb() -> None:
        with small.client() as client:
            wait_until(lambda: arena(client).moving > 0, what="pages on their way")
        small.wait_restarted(DRIVER, small.kill(DRIVER))

    push(small, disturb)
    wait_until(lambda: owned(small) == 0, what="pages given back")


def owned(up: Running) -> int:
    """Pages that anyone holds, in all tiers; 1 while memory has none to speak of."""
    with up.client() as client, suppress(HostDown, ValueError):
        found = arena(client)
        return found.owned + sum(line.owned for line in found.tiers)
    return 1


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A folder for a system whose pages lie on a file system of 8 KiB: two pages, and it is full."""
    folder = Path(tempfile.mkdtemp(prefix="llmos-"))
    pages = folder / "state" / "pages"
    pages.mkdir(parents=True)
    pages.parent.chmod(0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k,mode=700", "none", str(pages)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        shutil.rmtree(folder)
        pytest.skip("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(pages)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_full_disk_keeps_pages_where_they_are_and_fails_nobody(full_disk: Path) -> None:
    little_ram = SMALL.replace("host_pages = 12", "host_pages = 4")
    with small_system(SLOW_COMPUTE, little_ram, full_disk) as running:
        push(running)
        wait_until(lambda: owned(running) == 0, what="pages given back")
        logs = "".join(log.read_text() for log in (full_disk / "state" / "logs").iterdir())
        assert "the disk is full" in logs

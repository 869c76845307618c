"""Prompts that begin alike: who computes the common pages, and on which host they were last seen. Pure.

A prefix is named by a chain of hashes over full pages, salted by the tenant and the adapter. A hash that
collides costs a short wait or a worse placement, never a wrong token: what is shared is decided by memory, on
exact tokens.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from llmos.services.scheduler.task import Task

WORTH_WAITING = 64  # tokens: a shorter common prefix is computed twice
REMEMBERED = 8_192


def chain(salt: str, tokens: list[int], page_tokens: int) -> list[int]:
    """The names of the prefixes of 1, 2, ... full pages that a task could share (never its last token)."""
    raw = array("I", tokens).tobytes()
    width = 4 * page_tokens
    names, name = [], hash(salt)
    for at in range(0, ((len(tokens) - 1) // page_tokens) * width, width):
        name = hash((name, raw[at : at + width]))
        names.append(name)
    return names


class Computing:
    """The prefixes being computed on one host, and the tasks that wait for them instead of doing it again."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._by_name: dict[int, tuple[Task, int]] = {}  # who computes it, how many tokens it is long
        self._names: dict[int, list[int]] = {}
        self._held: dict[int, list[tuple[int, Task]]] = {}

    def leader(self, task: Task, names: list[int], cached: int = 0) -> tuple[Task, int] | None:
        """Who is computing the longest prefix of this task's that is worth waiting for, and its length."""
        if not self._by_name:
            return None
        low, high = 0, len(names)
        while low < high:  # a prefix being computed implies that the shorter ones are, or are cached
            middle = (low + high + 1) // 2
            if names[middle - 1] in self._by_name:
                low = middle
            else:
                high = middle - 1
        found = self._by_name.get(names[low - 1]) if low else None
        if found is None or found[0] is task or found[0].urgency > task.urgency:
            return None
        return found if found[1] - max(cached, found[0].computed) >= WORTH_WAITING else None

    def begin(self, task: Task, names: list[int]) -> None:
        """A task takes on its prompt; prefixes that another has taken on stay with that one."""
        mine = [name for name in names if name not in self._by_name]
        first = len(names) - len(mine)
        for index, name in enumerate(mine):
            self._by_name[name] = (task, (first + index + 1) * self._page_tokens)
        self._names[task.id] = mine

    def hold(self, task: Task, leader: Task, length: int) -> None:
        """A task waits until its leader has computed so many tokens."""
        self._held.setdefault(leader.id, []).append((length, task))

    def advance(self, leader: Task, computed: int) -> list[Task]:
        """What a leader has computed is in the index: those who waited for no more than that."""
        waiting = self._held.get(leader.id)
        names = self._names.get(leader.id)
        if names:
            kept = [name for name in names if self._by_name[name][1] > computed]
            for name in names[: len(names) - len(kept)]:
                del self._by_name[name]
            self._names[leader.id] = kept
        if not waiting:
            return []
        self._held[leader.id] = [entry for entry in waiting if entry[0] > computed]
        return [task for length, task in waiting if length <= computed]

    def leave(self, leader: Task) -> list[Task]:
        """A leader is gone, or will not go on: all who waited for it."""
        for name in self._names.pop(leader.id, []):
            del self._by_name[name]
        return [task for _, task in self._held.pop(leader.id, [])]

    def drop(self, task: Task) -> None:
        """A task that waited is gone."""
        for entries in self._held.values():
            entries[:] = [entry for entry in entries if entry[1] is not task]


class Affinity:
    """On which host a prefix was last computed; of each prompt the prefixes of 1, 2, 4, 8 ... pages."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, str] = OrderedDict()

    def note(self, names: list[int], arena: str) -> None:
        for name in _marks(names):
            self._seen[name] = arena
            self._seen.move_to_end(name)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def of(self, names: list[int]) -> str:
        """The host of the longest prefix that is remembered; empty where none is."""
        return next((self._seen[n] for n in reversed(_marks(names)) if n in self._seen), "")


def _marks(names: list[int]) -> list[int]:
    marks, at = [], 1
    while at <= len(names):
        marks.append(names[at - 1])
        at *= 2
    return marks

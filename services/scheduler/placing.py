"""On which host a task runs: the one that promised its deadline, that has its pages or its prefix, else the
least loaded. Pure."""

from __future__ import annotations

from collections.abc import Callable

from llmos.services.scheduler import displace
from llmos.services.scheduler.host import Host
from llmos.services.scheduler.prefixes import WORTH_WAITING, Affinity, chain
from llmos.services.scheduler.task import Task

LEAN = 0.25  # how much fuller than the emptiest a host may be and still be chosen for its prefix


class Placing:
    """Remembers where prefixes are; ``for_slot`` names who gives way to whom."""

    def __init__(self, for_slot: Callable[[Task, list[Task]], Task | None] = displace.for_slot) -> None:
        self._affinity = Affinity()
        self._for_slot = for_slot

    def place(self, task: Task, hosts: list[Host]) -> tuple[Host, Task | None] | None:
        """A host with a slot for the task, and the less urgent task that gives it up; None where none has."""
        allowed = [h for h in hosts if task.bound in ("", h.arena) and not _crowded(h, task)]
        if vacant := [host for host in allowed if host.vacant]:
            return self.ranked(task, vacant)[0], None
        victims = [(self._for_slot(task, host.running), host) for host in allowed]
        found = [(victim, host) for victim, host in victims if victim is not None]
        if not found:
            return None
        victim, host = max(found, key=lambda pair: displace.expendable(pair[0]))
        return host, victim

    def ranked(self, task: Task, hosts: list[Host]) -> list[Host]:
        """The hosts, best first."""
        self._name(task, hosts)
        if len(hosts) < 2:
            return hosts
        home = task.arena if task.kept else self._affinity.of(task.names or [])
        emptiest = min(_load(host) for host in hosts)
        return sorted(hosts, key=lambda h: (h.arena != home or _load(h) > emptiest + LEAN, _load(h)))

    def note(self, host: Host, task: Task) -> None:
        """A task computes its prompt on a host."""
        self._affinity.note(task.names or [], host.arena)

    def _name(self, task: Task, hosts: list[Host]) -> None:
        if task.names is None and hosts:
            long = task.prompt > WORTH_WAITING
            size = hosts[0].model.page_tokens
            task.names = chain(_salt(task), task.tokens[: task.prompt], size) if long else []


def _salt(task: Task) -> str:
    """Whose prefixes a task can share."""
    return f"{task.tenant}:{task.adapter}"


def _load(host: Host) -> float:
    return host.seated / host.model.slots


def _crowded(host: Host, task: Task) -> bool:
    """No pages are left, and nobody here would give this task some; or they are lent to another model."""
    if host.yields and not task.bound and not task.pages:
        return True
    if not host.short_of_pages or not host.seated or task.pages:
        return False
    if host.keepers and displace.keeper(host.keepers.values(), task) is not None:
        return False
    victim = displace.for_pages(task, host.running)
    return victim is None or victim.urgency <= task.urgency

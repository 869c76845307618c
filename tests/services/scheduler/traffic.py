"""What the scheduler's tests run on: a small model, tasks for it, and what must come out."""

from __future__ import annotations

from llmos.drivers.null.driver import next_token
from llmos.drivers.sdk.messages import LoadedModel
from llmos.ipc.grant import BANDS
from llmos.services.scheduler.simulator import Simulator
from llmos.services.scheduler.task import Task


def model(
    slots: int = 4,
    pages: int = 64,
    page_tokens: int = 4,
    chunk_tokens: int = 16,
    host_pages: int = 0,
    disk_pages: int = 0,
) -> LoadedModel:
    return LoadedModel(
        model="m",
        family="null",
        parameters=0,
        weight_bytes=0,
        pages=pages,
        page_tokens=page_tokens,
        page_bytes=1,
        slots=slots,
        max_context=pages * page_tokens,
        chunk_tokens=chunk_tokens,
        vocab_size=256,
        stop_tokens=[],
        attention="none",
        host_pages=host_pages,
        disk_pages=disk_pages,
    )


def task(
    id: int, prompt: list[int], count: int, arrived: float = 0.0, band: int = 1, tenant: str = "a"
) -> Task:
    return Task(id, tenant, tenant, "m", BANDS[band], list(prompt), len(prompt), len(prompt) + count, arrived)


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


def check_all(sim: Simulator, tasks: list[Task], prompts: dict[int, list[int]]) -> None:
    """Every task ended by length with exactly its tokens, and no page is lost."""
    for each in tasks:
        record = sim.records[each.id]
        assert record.reason == "length", f"task {each.id} ended by {record.reason} {record.error}"
        assert each.tokens == expected(prompts[each.id], each.limit - each.prompt)
        assert len(record.times) == each.produced, "a token was lost or sent twice"
    for memory in sim.memories.values():
        usage = memory.usage()
        assert usage.owned == 0
        assert usage.free + usage.cached == usage.total
        assert usage.moving == 0
        for tier in usage.tiers:
            assert tier.owned == 0
            assert tier.free + tier.cached == tier.total

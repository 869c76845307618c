"""What a tenant may have, over HTTP and the native protocol, also when a process is killed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import openai
import pytest

from llmos.ipc.client import Client
from llmos.ipc.errors import AccessDenied, Busy, HostDown
from llmos.services.memory.messages import Usage
from llmos.services.models.messages import Complete, Done, Generation
from llmos.services.scheduler.messages import Tasks
from tests.conftest import wait_until
from tests.system.conftest import Running
from tests.system.small import DRIVER, MODEL, PAGE, small_system

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

VICTIMS = ("scheduler", "memory", "security", DRIVER)
PROMPT = list(range(32, 64))


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with small_system("step_ms = 4.0", "slots = 8\npages = 256\nmax_context = 1024") as running:
        yield running


class Tenant:
    """A new tenant with a key; what it asks for runs on threads."""

    count = 0

    def __init__(self, up: Running, *limits: str) -> None:
        Tenant.count += 1
        self.up = up
        self.name = f"tenant{Tenant.count}"
        self.key = up.mint("--tenant", self.name, *limits)
        self._openai = up.openai(self.key)
        self._pool = ThreadPoolExecutor(16)

    def ask(self, tokens: int, prompt: list[int] = PROMPT) -> int:
        """How many tokens one request produced."""
        answer = self._openai.completions.create(
            model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    def submit(self, tokens: int, prompt: list[int]) -> Future[int]:
        return self._pool.submit(self.ask, tokens, prompt)

    def begin(self, count: int, tokens: int) -> list[Future[int]]:
        """Requests at once, which share no prefix."""
        return [self.submit(tokens, [i, *PROMPT]) for i in range(count)]

    def states(self) -> list[str]:
        """Of its tasks; nothing while the scheduler is not there."""
        with self.up.client() as client:
            tasks = client.call("scheduler.tasks", None, Tasks).tasks
        return [task.state for task in tasks if task.tenant == self.name]

    def pages(self) -> int:
        """How many it owns, on the device and beside it."""
        with self.up.client() as client:
            (arena,) = client.call("memory.usage", None, Usage).arenas
        everywhere = [arena.tenants, *(tier.tenants for tier in arena.tiers)]
        return sum(line.owned for tenants in everywhere for line in tenants if line.tenant == self.name)

    def refusal(self, tokens: int) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as raised:
            self.ask(tokens)
        return raised.value

    def wait_queue(self, waiting: int) -> None:
        wait_until(lambda: self.states().count("waiting") == waiting, 60.0, f"{waiting} waiting tasks")


def crash(up: Running, name: str) -> None:
    """kill -9, and wait until the system is whole again."""
    up.wait_restarted(name, up.kill(name))
    up.wait_healthy()
    with up.http() as http:
        headers = {"Authorization": f"Bearer {up.key}"}
        wait_until(
            lambda: http.get(f"/v1/models/{MODEL}", headers=headers).json().get("state") == "ready",
            what="the model",
        )


def check_retry(refused: openai.APIStatusError, limit: str) -> float:
    """A 429 that names the limit and says when to come again."""
    assert refused.status_code == 429
    assert refused.body["type"] == "rate_limit_error"  # type: ignore[index]
    assert limit in str(refused)
    seconds = float(refused.response.headers["Retry-After"])
    assert 1 <= seconds <= 60
    return seconds


def observed(peak: Callable[[], int], tasks: list[Future[int]]) -> int:
    """The highest value seen until all tasks have ended."""
    highest = 0
    while not all(task.done() for task in tasks):
        with suppress(HostDown, ValueError):  # who counts may be the one who was killed
            highest = max(highest, peak())
    return highest


@pytest.mark.slow
def test_tokens_per_minute_survive_the_death_of_anyone(small: Running) -> None:
    tenant = Tenant(small, "--tokens-per-minute", "600")
    assert tenant.ask(560) == 560, "a full minute's may be asked for at once"
    wait = check_retry(tenant.refusal(540), "tokens_per_minute")
    for name in VICTIMS:
        crash(small, name)
        left = check_retry(tenant.refusal(540), "tokens_per_minute")
        assert left <= wait, "and the wait goes on where it was"
        wait = left
    assert Tenant(small, "--tokens-per-minute", "600").ask(560) == 560, "another tenant's are its own"


def test_the_native_protocol_names_the_limit_and_the_time(small: Running) -> None:
    tenant = Tenant(small, "--tokens-per-minute", "300", "--max-pages", "16", "--max-tokens", "240")
    assert tenant.ask(200) == 200
    with Client(tenant.key, run=small.run) as client:
        ask = lambda tokens: client.call(  # noqa: E731
            "models.complete",
            Complete(model=MODEL, prompt=PROMPT, generation=Generation(max_tokens=tokens)),
            Done,
        )
        for tokens, error, limit in (
            (100, Busy, "tokens_per_minute"),
            (15 * PAGE, AccessDenied, "max_pages"),
            (241, AccessDenied, "max_tokens"),
        ):
            with pytest.raises(error, match=limit) as raised:
                ask(tokens)
            assert raised.value.details["exceeded"] == limit
            assert 0 < float(str(raised.value.details.get("retry_after", 1))) < 60


def test_more_tasks_than_may_run_wait_and_more_than_may_wait_are_refused(small: Running) -> None:
    tenant = Tenant(small, "--max-running", "1", "--max-queued", "3")
    tasks = tenant.begin(4, tokens=120)
    tenant.wait_queue(3)
    check_retry(tenant.refusal(8), "max_queued")
    assert [task.result() for task in tasks] == [120] * 4
    assert tenant.ask(8) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", VICTIMS)
def test_running_and_queued_limits_hold_when_someone_is_killed(small: Running, name: str) -> None:
    tenant = Tenant(small, "--max-running", "2", "--max-queued", "3")
    tasks = tenant.begin(5, tokens=400)
    tenant.wait_queue(3)
    crash(small, name)
    more = tenant.begin(9, tokens=400)
    assert 0 < observed(lambda: tenant.states().count("running"), [*tasks, *more]) <= 2
    errors = [error for task in more if (error := task.exception()) is not None]
    assert len(errors) >= 4, "there is room for five at once"
    for error in errors:
        assert isinstance(error, openai.RateLimitError)
        check_retry(error, "max_queued")
    # What was under way went on, but for what the scheduler took along.
    assert all((task.exception() is not None) == (name == "scheduler") for task in tasks)


@pytest.mark.slow
@pytest.mark.parametrize("name", VICTIMS)
def test_a_quota_of_pages_holds_when_someone_is_killed(small: Running, name: str) -> None:
    tenant = Tenant(small, "--max-pages", "32")
    tasks = tenant.begin(6, tokens=300)  # 21 pages each at its end
    wait_until(lambda: tenant.pages() > 16, what="pages in use")
    crash(small, name)
    if name == "scheduler":
        assert all(isinstance(task.exception(), openai.APIError) for task in tasks)
        wait_until(lambda: tenant.pages() == 0, what="pages given back")
        tasks = tenant.begin(6, tokens=300)
    assert 16 < observed(tenant.pages, tasks) <= 32
    assert [task.result() for task in tasks] == [300] * 6, "they wait for each other, and none fails"


def test_a_task_that_can_never_fit_its_quota_is_refused_at_once(small: Running) -> None:
    tenant = Tenant(small, "--max-pages", "4")
    refused = tenant.refusal(4 * PAGE)
    assert refused.status_code == 403
    assert "max_pages" in str(refused)
    answer = small.openai(tenant.key).completions.create(model=MODEL, prompt=PROMPT, max_tokens=2 * PAGE)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 2 * PAGE

"""Parking a model and waking it: how long it takes against loading it, and how fast against the bare link.

    python -m benchmarks.park --model smollm2.gguf
    python -m benchmarks.park --model random:benchmarks/shapes/llama-3.1-8b.json --dtype bfloat16 \
        --page-tokens 64 --slots 64 --pages 2048

One process with the driver. The model is loaded twice, the second time from the cache and with its programs
compiled already; that is what waking is compared with. Then it is parked and woken ``--rounds`` times; the
first park is told apart, since it page-locks memory that the others use again. The same prompt is answered
before and after, and must give the same tokens. On a device behind a bus the link is measured as in
``benchmarks.swap``. With ``--beside N`` another model of the same kind decodes N sequences meanwhile, and the
times between its steps are compared with those while nothing is parked.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import msgspec

from benchmarks.report import Report, arguments
from benchmarks.swap import link_rates
from llmos.drivers.jax.driver import JaxDriver
from llmos.drivers.sdk.driver import Finish, PendingMove
from llmos.drivers.sdk.executor import Executor
from llmos.drivers.sdk.messages import (
    Chunk,
    LoadedModel,
    LoadRequest,
    Moved,
    Quantum,
    QuantumDone,
    Start,
    Step,
)
from llmos.ipc.errors import LLMOSError

PROMPT = [11, 7, 23, 5, 17, 3, 29, 2]
TOKENS = 16
LINK_BYTES = 1 << 30
QUANTUM_STEPS = 8
ALONE_QUANTA = 4


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long it took, and what came of it."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def carried(pending: PendingMove) -> Moved:
    """Park or wake as the SDK does, but on one thread."""
    return pending()()


def resident() -> int:
    """Bytes of RAM that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def held(device: Any) -> int:
    """Bytes in use on the device; 0 where it cannot tell."""
    return int((device.memory_stats() or {}).get("bytes_in_use", 0))


def answer(driver: JaxDriver, loaded: LoadedModel) -> list[int]:
    """Greedy tokens after a prompt, in a batch that is empty before and after."""
    pages = list(range(-(-(len(PROMPT) + TOKENS) // loaded.page_tokens)))
    start = Start(slot=0, tokens=PROMPT, prompt=len(PROMPT), pages=pages, limit=len(PROMPT) + TOKENS)
    quantum = Quantum(
        id=1,
        model=loaded.model,
        steps=TOKENS,
        start=[start],
        chunks=[Chunk(0, 0, 0, len(PROMPT))],
        decode=[0],
    )
    tokens = [token for step in driver.execute(quantum) for token in step().tokens]
    driver.reset(loaded.model)
    return tokens


def load(driver: JaxDriver, request: LoadRequest) -> tuple[float, LoadedModel]:
    """The second load of a model, which finds everything in the cache."""
    driver.load(request, lambda _: None)
    driver.unload(request.model)
    took, loaded = seconds(lambda: driver.load(request, lambda _: None))
    while driver.idle():
        pass
    return took, loaded


def park_and_wake(driver: JaxDriver, loaded: LoadedModel, rounds: int) -> dict[str, Any]:
    """Seconds of each way, and memory in use while the model is awake and while it is parked."""
    device, expected = jax.devices()[0], answer(driver, loaded)
    out, back, first = [], [], 0.0
    figures: dict[str, Any] = {"awake": {"device_bytes": held(device), "rss_bytes": resident()}}
    for number in range(rounds + 1):
        left, moved = seconds(lambda: carried(driver.park(loaded.model)))
        figures["parked"] = {"device_bytes": held(device), "rss_bytes": resident()}
        came, _ = seconds(lambda: carried(driver.wake(loaded.model)))
        if answer(driver, loaded) != expected:
            raise AssertionError("the model does not say what it said before it was parked")
        if number:
            out.append(left)
            back.append(came)
        else:
            first = left
    times = {"first_park_s": first, "park_s": statistics.median(out), "wake_s": statistics.median(back)}
    figures |= {name: round(value, 4) for name, value in times.items()}
    figures |= {"bytes": moved.bytes}
    for name in ("park", "wake"):
        figures[f"{name}_gb_per_s"] = round(moved.bytes / times[f"{name}_s"] / 1e9, 2)
    return figures


class Other:
    """A model that decodes all the time; the sink of its own quanta."""

    def __init__(self, driver: JaxDriver, loaded: LoadedModel, sequences: int) -> None:
        self._executor = Executor(driver)
        self._model = loaded.model
        self._quanta = 0
        self._slots = list(range(sequences))
        self.times: list[float] = []
        each = -(-loaded.max_context // loaded.page_tokens)
        starts = [
            Start(
                slot=slot,
                tokens=PROMPT,
                prompt=len(PROMPT),
                pages=list(range(slot * each, (slot + 1) * each)),
                limit=loaded.max_context,
            )
            for slot in self._slots
        ]
        self._run(sequences, start=starts, chunks=[Chunk(slot, slot, 0, len(PROMPT)) for slot in self._slots])

    def _run(self, steps: int, **fields: Any) -> None:
        self._quanta += 1
        self._executor.submit(Quantum(id=self._quanta, model=self._model, steps=steps, **fields), self)
        while self._executor.advance():
            pass

    def gaps(self, quanta: Iterable[object]) -> list[float]:
        """Milliseconds between the steps of so many quanta; those from one to the next count as well."""
        self.times = []
        for _ in quanta:
            self._run(QUANTUM_STEPS, decode=self._slots)
        return [1e3 * (after - before) for before, after in zip(self.times, self.times[1:])]

    def step(self, step: Step) -> None:
        if not step.tokens:
            raise AssertionError("a sequence ended: raise --context or lower --rounds")
        self.times.append(time.perf_counter())

    def done(self, result: QuantumDone) -> None:
        return

    def fail(self, error: LLMOSError) -> None:
        raise error


def beside(driver: JaxDriver, loaded: LoadedModel, other: Other, rounds: int) -> dict[str, Any]:
    """Milliseconds between the other model's steps, alone and while this one is parked or woken, by turns."""
    alone: list[float] = []
    meanwhile: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(rounds):
            for way in (driver.park, driver.wake):
                alone += other.gaps(range(ALONE_QUANTA))
                meanwhile += other.gaps(_until_done(pool.submit(way(loaded.model))))
    return {
        name: {
            "steps": len(gaps),
            "p50": _percentile(gaps, 50),
            "p99": _percentile(gaps, 99),
            "max": max(gaps),
        }
        for name, gaps in (("alone", alone), ("meanwhile", meanwhile))
    }


def _until_done(copying: Future[Finish]) -> Iterator[None]:
    """Turns while a model is being copied, and one after its last part."""
    while not copying.done():
        yield
    copying.result()()
    yield


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def main() -> None:
    parser = arguments(str(__doc__).partition("\n")[0])
    parser.add_argument("--model", required=True, help="a GGUF file, a folder, or random:CONFIG.json")
    parser.add_argument("--cache", default="", help="keep converted weights and programs here")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", default="same")
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=int, default=0, help="sequences of another model, meanwhile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        request = LoadRequest(
            model="bench",
            source=options.model,
            cache=options.cache or folder,
            dtype=options.dtype,
            weights=options.weights,
            kv_dtype=options.dtype,
            page_tokens=options.page_tokens,
            pages=options.pages,
            slots=options.slots,
            max_context=options.context,
        )
        driver = JaxDriver()
        took, loaded = load(driver, request)
        figures = park_and_wake(driver, loaded, options.rounds)
        report = Report("park")
        report.figures = {"load_s": round(took, 3), "weight_bytes": loaded.weight_bytes, **figures}
        report.figures["kv_bytes"] = loaded.pages * loaded.page_bytes
        if options.beside:
            needed = options.beside * -(-options.context // options.page_tokens)
            own = msgspec.structs.replace(request, model="other", pages=needed, slots=options.beside)
            other = Other(driver, driver.load(own, lambda _: None), options.beside)
            report.figures["step_gaps_ms"] = beside(driver, loaded, other, options.rounds)
            driver.unload("other")
        report.ratios = {"wake_of_load": round(figures["wake_s"] / took, 5)}
        if jax.devices()[0].platform != "cpu":
            # Nothing but the link: the model is away, or there might be no room for the copies.
            carried(driver.park("bench"))
            link = link_rates(jax.devices()[0], min(LINK_BYTES, loaded.weight_bytes), options.rounds)
            report.peers = {"plain_jax_copies_gb_per_s": link}
            best = {way: max(link[f"{way}_pinned"], link[f"{way}_pageable"]) for way in ("out", "in")}
            report.ratios["park_of_link"] = round(figures["park_gb_per_s"] / best["out"], 3)
            report.ratios["wake_of_link"] = round(figures["wake_gb_per_s"] / best["in"], 3)
        report.environment = {"device": driver.describe().devices[0].name}
        driver.unload("bench")
    report.write(options.json)


if __name__ == "__main__":
    main()

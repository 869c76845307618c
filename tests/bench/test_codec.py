"""What it costs to write and to read a message."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from llmos.drivers.sdk.messages import Chunk, Quantum, Start, Step
from llmos.ipc import codec, header
from llmos.ipc.header import VERSION, Header, Kind
from llmos.services.models.messages import Chat, ChatMessage, Text
from llmos.services.scheduler.messages import Emitted, Tokens

HEADER = Header(VERSION, Kind.CALL, "scheduler", "submit", 123456, 3, 0, 1_700_000_000_000_000, (12, 3456))
CHAT = Chat(model="m", messages=[ChatMessage("user", "What is an operating system? " * 20) for _ in range(8)])
STEP = Step(7, 3, list(range(256)), list(range(1000, 1256)), [(5, "stop")], 15_000)
QUANTUM = Quantum(
    id=7, model="m", steps=8, decode=list(range(256)),
    start=[Start(slot=1, tokens=list(range(2000)), prompt=2000, pages=list(range(130)), limit=2064)],
    chunks=[Chunk(step, 1, step * 256, 256) for step in range(8)],
)  # fmt: skip
EMITTED = Emitted([Tokens(id, 100, [id % 50_000]) for id in range(256)])


def test_a_header_is_written(benchmark: BenchmarkFixture) -> None:
    benchmark(header.encode, HEADER)


def test_a_header_is_read(benchmark: BenchmarkFixture) -> None:
    assert benchmark(header.decode, header.encode(HEADER)) == HEADER


def test_a_conversation_is_read(benchmark: BenchmarkFixture) -> None:
    assert benchmark(codec.decode, codec.encode(CHAT), Chat) == CHAT


def test_a_piece_of_text_is_written(benchmark: BenchmarkFixture) -> None:
    benchmark(codec.encode, Text(" hello", 17))


def test_a_step_of_256_sequences_is_read(benchmark: BenchmarkFixture) -> None:
    assert benchmark(codec.decode, codec.encode(STEP), Step) == STEP


def test_a_quantum_of_256_sequences_is_written(benchmark: BenchmarkFixture) -> None:
    benchmark(codec.encode, QUANTUM)


def test_the_tokens_of_256_tasks_are_read(benchmark: BenchmarkFixture) -> None:
    assert benchmark(codec.decode, codec.encode(EMITTED), Emitted) == EMITTED

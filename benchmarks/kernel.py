"""Round trips through the kernel, capability checks on, beside a bare ZeroMQ forwarder and grpc.aio.

``python -m benchmarks.kernel [--json FILE]``. Client, router and server are processes of their own. Rate is
measured with 32 calls outstanding, latency with one. The three systems take turns, round by round, so that
what the machine does meanwhile meets all of them; the ratios are medians over the rounds.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from benchmarks.report import Report, arguments
from llmos.ipc import codec, header, paths
from llmos.ipc.grant import Grant
from llmos.ipc.header import VERSION, Header, Kind
from llmos.ipc.server import Incoming, Server, method
from llmos.ipc.sockets import configure, connect
from llmos.kernel.messages import BootEntry, BootFile, Hello

BODY = os.urandom(150)
WINDOW = 32
Measure = Callable[[int, int], list[float]]


class Echo(Server):
    """Answers with what it was sent."""

    name = "echo"

    @method
    def echo(self, request: bytes, call: Incoming) -> bytes:
        return request


class BareEcho:
    """The same work over the bare forwarder: a DEALER that sends back what it gets."""

    @staticmethod
    def run(address: str) -> None:
        socket = configure(zmq.Context().socket(zmq.DEALER))
        socket.set(zmq.ROUTING_ID, b"echo")
        socket.connect(address)
        while True:
            socket.poll()
            while True:
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                socket.send_multipart(frames)


def forwarder(address: str) -> None:
    """The floor: a synchronous ROUTER that forwards by the first frame of the payload, and checks nothing."""
    socket = configure(zmq.Context().socket(zmq.ROUTER))
    socket.bind(address)
    while True:
        socket.poll()
        while True:
            try:
                sender, to, *rest = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            socket.send_multipart([to, sender, *rest])


def round_trips(
    socket: zmq.Socket[bytes], request: Callable[[int], list[bytes]], count: int, window: int
) -> list[float]:
    """Send ``count`` requests with ``window`` outstanding; seconds from each send to its answer."""
    sent: list[float] = []
    times: list[float] = []
    while len(times) < count:
        while len(sent) - len(times) < window and len(sent) < count:
            sent.append(time.perf_counter())
            socket.send_multipart(request(len(sent)))
        socket.poll()
        while True:
            try:
                socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            times.append(time.perf_counter() - sent[len(times)])
    return times


class Kernel:
    """The real kernel process, an echo service built on the service loop, and a client's socket."""

    def __init__(self, run: Path) -> None:
        grants = {
            "echo": Grant(principal="echo", tenant="system", serves="echo"),
            "user": Grant(principal="user", tenant="local", calls=["echo.echo"]),
        }
        paths.private_dir(run / "tokens")
        entries = []
        for name, grant in grants.items():
            token = os.urandom(16).hex()
            paths.write_private(paths.token_path(name, run), token.encode())
            entries.append(BootEntry(hashlib.sha256(token.encode()).hexdigest(), grant))
        paths.write_private(run / "boot", codec.encode(BootFile(entries)))
        environment = {**os.environ, "LLMOS_RUN": str(run)}
        self.processes = [
            subprocess.Popen([sys.executable, "-m", "llmos.kernel"], env=environment),
            subprocess.Popen([sys.executable, "-m", "benchmarks.kernel", "--serve-echo"], env=environment),
        ]
        self._socket = connect(zmq.Context(), paths.socket_address("kernel", run))
        hello = header.encode(Header(VERSION, Kind.KERNEL, "", "hello", 1))
        self._socket.send_multipart([hello, codec.encode(Hello(paths.read_token("user", run)))])
        self._socket.recv_multipart()
        self._body = codec.encode(BODY)
        self._await_echo()

    def _await_echo(self) -> None:
        while True:
            self._socket.send_multipart(self._request(1))
            if header.decode(self._socket.recv_multipart()[0]).kind == Kind.REPLY:
                return
            time.sleep(0.05)

    def _request(self, id: int) -> list[bytes]:
        return [header.encode(Header(VERSION, Kind.CALL, "echo", "echo", id)), self._body]

    def measure(self, count: int, window: int) -> list[float]:
        return round_trips(self._socket, self._request, count, window)


class Bare:
    """The bare forwarder and echo as processes, and a client's socket."""

    def __init__(self, run: Path) -> None:
        address = f"ipc://{run}/bare.sock"
        spawn = multiprocessing.get_context("spawn")
        self.processes = [
            spawn.Process(target=forwarder, args=(address,), daemon=True),
            spawn.Process(target=BareEcho.run, args=(address,), daemon=True),
        ]
        for process in self.processes:
            process.start()
        self._socket = connect(zmq.Context(), address)
        self._payload = [
            b"echo",
            codec.encode("header of about fifty bytes, as the kernel's is"),
            codec.encode(BODY),
        ]
        while not self._socket.poll(50):
            self._socket.send_multipart(self._payload)
        while self._socket.poll(200):
            self._socket.recv_multipart()

    def measure(self, count: int, window: int) -> list[float]:
        return round_trips(self._socket, lambda _: self._payload, count, window)


def serve_grpc(address: str) -> None:
    """The same echo in grpc.aio, which has no hop in between."""
    import grpc

    async def serve() -> None:
        server = grpc.aio.server()

        async def echo(request: bytes, context: object) -> bytes:
            return request

        handler = grpc.method_handlers_generic_handler(
            "echo", {"echo": grpc.unary_unary_rpc_method_handler(echo)}
        )
        server.add_generic_rpc_handlers((handler,))
        server.add_insecure_port(address)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


class Grpc:
    def __init__(self, run: Path) -> None:
        self._address = f"unix:{run}/grpc.sock"
        spawn = multiprocessing.get_context("spawn")
        self.processes = [spawn.Process(target=serve_grpc, args=(self._address,), daemon=True)]
        self.processes[0].start()

    def measure(self, count: int, window: int) -> list[float]:
        return asyncio.run(self._measure(count, window))

    async def _measure(self, count: int, window: int) -> list[float]:
        import grpc

        async with grpc.aio.insecure_channel(self._address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 20)
            echo = channel.unary_unary("/echo/echo")
            times: list[float] = []

            async def worker(share: int) -> None:
                for _ in range(share):
                    begun = time.perf_counter()
                    await echo(BODY)
                    times.append(time.perf_counter() - begun)

            await asyncio.gather(*(worker(count // window) for _ in range(window)))
            return times


def rate(measure: Measure, count: int) -> float:
    """Round trips a second with a full window."""
    begun = time.perf_counter()
    done = len(measure(count, WINDOW))
    return done / (time.perf_counter() - begun)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def run(rounds: int, count: int) -> Report:
    """Measure all three in turn, ``rounds`` times."""
    folder = Path(tempfile.mkdtemp(prefix="llmos-b"))
    systems: dict[str, Kernel | Bare | Grpc] = {
        "kernel": Kernel(folder),
        "bare": Bare(folder),
        "grpc": Grpc(folder),
    }
    rates: dict[str, list[float]] = {name: [] for name in systems}
    p50: dict[str, list[float]] = {name: [] for name in systems}
    p99: dict[str, list[float]] = {name: [] for name in systems}
    try:
        for number in range(rounds + 1):
            for name, each in systems.items():
                size = count // 10 if name == "grpc" else count
                one, latencies = rate(each.measure, size), each.measure(size // 10, 1)
                if number:  # the first round warms up
                    rates[name].append(one)
                    p50[name].append(percentile(latencies, 0.5))
                    p99[name].append(percentile(latencies, 0.99))
    finally:
        for each in systems.values():
            for process in each.processes:
                process.terminate()
        shutil.rmtree(folder, ignore_errors=True)

    def figures(name: str) -> dict[str, float]:
        return {
            "round_trips_per_s": round(statistics.median(rates[name])),
            "p50_us": round(statistics.median(p50[name]) * 1e6, 1),
            "p99_us": round(statistics.median(p99[name]) * 1e6, 1),
        }

    report = Report("kernel", figures("kernel"), {"bare": figures("bare"), "grpc.aio": figures("grpc")})
    for peer in ("bare", "grpc"):
        report.ratios[f"rate_over_{peer}"] = round(_paired(rates["kernel"], rates[peer]), 3)
        report.ratios[f"p50_over_{peer}"] = round(_paired(p50["kernel"], p50[peer]), 3)
    return report


def _paired(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = arguments("Round trips through the kernel, beside a bare forwarder and grpc.aio.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=20_000, help="round trips in each round")
    parser.add_argument(
        "--serve-echo", action="store_true", help="be the echo service (used by the program itself)"
    )
    options = parser.parse_args()
    if options.serve_echo:
        Echo().serve()
        return
    run(options.rounds, options.count).write(options.json)


if __name__ == "__main__":
    main()

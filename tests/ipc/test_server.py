"""The service loop: answers that are there are heard before calls that wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmos.ipc.calls import Answer
from llmos.ipc.grant import Grant
from llmos.ipc.server import Incoming, Later, Server, method
from tests.conftest import System

CALLS = 3
GRANTS = {
    "user": Grant(principal="user", tenant="t", calls=["asker.*", "kernel.*"]),
    "asker": Grant(principal="asker", tenant="system", serves="asker", calls=["kernel.*"]),
}


class Asker(Server):
    """Asks the kernel something on every call; the call is not left before the answer is there."""

    name = "asker"

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.heard: list[str] = []

    @method
    def ask(self, request: None, call: Incoming) -> Later:
        self.heard.append("call")
        self.call("kernel.names", None, self._on_answer)
        assert self.data.socket.poll(10_000)
        call.reply()
        return Later()

    def _on_answer(self, answer: Answer) -> None:
        self.heard.append("answer")


def test_an_answer_is_heard_before_calls_that_came_first(
    system: Callable[[dict[str, Grant]], System],
) -> None:
    made = system(GRANTS)
    made.kernel()
    asker = Asker(made.run)
    asker._register()
    asker.control.verb("ready", None)
    made.wait_ready("asker")
    client = made.client()
    for _ in range(CALLS):
        client._link.call("asker.ask", b"\xc0", 0, lambda answer: None)
    client.call("kernel.names")  # the kernel has passed on what was sent before
    while len(asker.heard) < 2 * CALLS:
        asker.turn()
    assert asker.heard == ["call", "answer"] * CALLS
    asker.control.close()
    asker.data.close()
    asker.context.term()

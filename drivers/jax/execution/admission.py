"""How sequences get into the batch on the device, and how their block tables grow there."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from llmos.drivers.jax.execution import packing
from llmos.drivers.jax.execution.replica import Replica
from llmos.drivers.jax.execution.spec import ADMIT_ROWS
from llmos.drivers.jax.execution.state import empty_tallies
from llmos.drivers.sdk.messages import Growth, Start


def admit(replica: Replica) -> None:
    """Dispatch what is ``entering``: the batch has it from now on."""
    if not replica.entering:
        return
    starts, replica.entering = replica.entering, []
    slots, adapters = replica.ledger.slots, replica.programs.spec.room is not None
    program = replica.programs.get(("admit",))
    for at in range(0, len(starts), ADMIT_ROWS):
        part = starts[at : at + ADMIT_ROWS]
        packed = packing.admission(part, slots, replica.limits, replica.width, adapters)
        replica.batch = program(replica.batch, *packed)
    if replica.speculation is not None:
        replica.speculation.begin(starts)
    for start in starts:
        _count(replica, start)


def grow(replica: Replica, growths: Sequence[Growth]) -> None:
    """Dispatch pages that the ledger has given to slots."""
    program = replica.programs.get(("grow",))
    for cells in packing.growth(growths, replica.ledger.slots, replica.limits.slots):
        replica.batch = program(replica.batch, *cells)


def _count(replica: Replica, start: Start) -> None:
    """Tally the tokens of a sequence with penalties, or forget those of its slot's last one."""
    penalised = replica.ledger.slots[start.slot].variant == "full"
    if penalised or start.slot in replica.tallied:
        if replica.tallies is None:
            empty = empty_tallies(replica.limits.slots, replica.limits.vocab_size)
            replica.tallies = jax.device_put(empty, replica.common)
        program = replica.programs.get(("tally",))
        replica.tallies = program(replica.tallies, *packing.tally(start, replica.limits))
    (replica.tallied.add if penalised else replica.tallied.discard)(start.slot)

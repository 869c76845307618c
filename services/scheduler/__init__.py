"""The scheduler: turns tasks into quanta for the drivers, and can take the device back at any step.

messages.py   the link
task.py       one task, as plain state
steptime.py   how long a step takes, fitted from measured steps (pure)
fitting.py    least squares for that: a plane, or one that bends (pure)
slippage.py   how much longer runs of steps took than was forecast (pure)
admission.py  can a deadline be kept? (pure)
forecast.py   realtime tasks run ahead of time (pure)
crowding.py   how many deadlines are promised at once, and how near (pure)
pacing.py     prompts wait for those whose deadlines are near (pure)
promises.py   the deadlines that a host has promised, and when lower bands hold still for them (pure)
limits.py     tokens per minute (pure)
quotas.py     whether a tenant may have one more task, and which limit says no (pure)
charges.py    what was used of the tokens per minute, kept for the next scheduler
rows.py       the interactive tasks in a host's slots, by tenant (pure)
headroom.py   slots that a tenant's flood leaves to the others (pure)
prefixes.py   prompts that begin alike: who computes it, where it was seen (pure)
placing.py    on which host a task runs (pure)
queue.py      who is next: bands, deadlines, fairness between tenants, aging (pure)
flight.py     a quantum that was sent, and what is still to come of it (pure)
host.py       one model on one driver: slots, quanta in flight, results applied (pure)
compose.py    a host's state -> its next quantum (pure)
displace.py   who must give way (pure)
order.py      what another policy would do otherwise (pure)
tiers.py      a host's tiers: links as measured, open transfers, swap or compute again (pure)
swapping.py   tasks swapped out and in, cold cache demoted, hits fetched (no I/O, no clock)
core.py       what happens on every event; asks for effects through an interface (no I/O, no clock)
seating.py    who gets a slot, and who gives it up (no I/O, no clock)
paging.py     pages asked for, grown, shared, taken from one for another (no I/O, no clock)
lasting.py    whether a task that is seated keeps its pages for long enough (pure)
lending.py    pages of one pool that models lend each other (no I/O, no clock)
encoding.py   work for encoders: who is next, what goes into one step (no I/O, no clock)
effects.py    those effects as messages to memory, the drivers and the callers
swap_effects.py    swapping's effects as messages, and the moves that drivers make
encode_effects.py  encoding's effects as messages
server.py     the message handlers
simulator.py  the core and memory's policy in simulated time; simulated_clock.py, simulated_device.py,
              simulated_memory.py (calls to memory) and simulated_cache.py (its KV) are parts of it
"""

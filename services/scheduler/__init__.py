"""The scheduler: turns tasks into quanta for the drivers, and can take the device back at any step.

messages.py   the link
task.py       one task, as plain state
queue.py      who is next: bands, deadlines, fairness between tenants, aging (pure)
host.py       one model on one driver: slots, quanta in flight, results applied (pure)
compose.py    a host's state -> its next quantum (pure)
displace.py   who must give way (pure)
core.py       what happens on every event; asks for effects through an interface (no I/O, no clock)
effects.py    those effects as messages to memory, the drivers and the callers
server.py     the message handlers
"""

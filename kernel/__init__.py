"""The kernel: routes messages between isolated servers, and does nothing else.

messages.py    the bodies of the kernel's verbs and methods
table.py       what the kernel knows: connections, grants held, calls outstanding, names
dispatcher.py  one message in, the messages out: the fast path, and the checks behind it (no I/O)
verbs.py       hello, present, ready, watch: how a connection gets its rights and its name (no I/O)
methods.py     what the kernel answers as the service "kernel": stats, names, trace, revoke, stop (no I/O)
loop.py        the sockets, the poll loop, liveness of peers by pidfd, and CURVE authentication
"""

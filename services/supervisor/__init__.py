"""The supervisor: starts every process of the manifest, watches them, brings them back, stops them in order.

plan.py     manifest -> the processes, in order (pure)
grants.py   manifest and boot.toml -> who may call what, and the tokens that prove it (pure)
restart.py  when a process that ended is started again, and when it is given up (pure)
health.py   whether a process makes progress, from the kernel's name table (pure)
stopping.py what to do to a process that should leave, by how long it has been asked (pure)
roster.py   what is known of each process, and the events that change it (no I/O)
status.py   the file in which the supervisor says how things are
files.py    what lies in the run folder: written before the start, removed after the stop
lock.py     one supervisor per run folder; who holds it
process.py  starting one process: environment, log, death of the parent
child.py    what runs first in each of them
link.py     the supervisor's own connection to the kernel, which never waits
loop.py     the loop that ties it together
control.py  finding, starting and stopping a supervisor from outside

The supervisor is a client of the kernel and no ``Server``: a service waits for the kernel, but the supervisor
is what brings the kernel back.
"""

"""The ``llmos`` command: the people's side.

main.py       the verbs and their options; nothing else is imported until a verb runs
output.py     how things are printed: lines, tables, errors; plain where it is no terminal
progress.py   bars for what takes longer than a moment
session.py    the connection of the local user
boot.py       up, down
processes.py  ps
tasks.py      kill, nice, stop, cont, free
generate.py   run, chat
catalogue.py  models, load, unload, pull
keys.py       cap
doctor.py     doctor; about.py version
demo.py       ``python -m llmos.shell.demo``: the whole system, from nothing to an answer and back
"""

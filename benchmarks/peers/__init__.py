"""One program per engine that ``benchmarks.cpu_peers`` compares, each run in an environment of its own.

They hold one model each and answer requests on their standard input (``worker``); only ``engine`` imports
this project.
"""

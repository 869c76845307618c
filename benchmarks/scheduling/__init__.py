"""Scheduling policies compared on the same traffic, simulated: ``python -m benchmarks.scheduling``."""

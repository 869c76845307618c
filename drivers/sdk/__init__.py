"""The driver SDK: it owns the loop, a driver is a class of callbacks.

messages.py   what travels between the scheduler and a driver
driver.py     the callbacks an author writes
executor.py   keeps two steps in flight and honours a preempt between steps (no I/O)
server.py     the messages in, the results out
__main__.py   runs the driver that the manifest names
"""

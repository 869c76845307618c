"""Monitor: collects what the others count, and says whether the system makes progress.

messages.py  the link
health.py    from counters to health: progress, not existence
poller.py    which questions are open, and the last answers to them
server.py    asks each second, and answers ``snapshot``
"""

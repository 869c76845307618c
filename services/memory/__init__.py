"""Memory: owns the accounting of every KV page, and the prefix index over them.

messages.py    the link
pages.py       which pages of an arena are free, and how many tasks hold each of the others
radix.py       the prefix index: which full pages hold which tokens, for whom; what to evict
slabs.py       the pages of arenas that share one memory, in parts that change hands
arena.py       reserve, grow, commit and free over pages and index; quotas
arenas.py      all arenas and pools by name
restoring.py   an arena as its scheduler says it is
tiers.py       host memory and disk: swapping, demoting, fetching
transfers.py   pages on their way between tiers
costs.py       move a page or compute it again
invariants.py  the invariants, checked after every operation in tests
server.py      the message handlers
"""

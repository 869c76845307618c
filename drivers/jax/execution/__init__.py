"""The life of a quantum on one replica: ``engine`` first, then ``replica``, ``ledger`` and ``programs``.

Which programs there are is in ``spec``, and what each is in ``recipes``.
"""

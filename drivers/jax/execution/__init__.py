"""The life of a quantum on one replica: ``engine`` first, then ``replica``, ``ledger`` and ``programs``."""

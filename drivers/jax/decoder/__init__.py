"""A decoder: its configuration, its modules (``layers``, ``experts``), and a pass through them."""

"""Paged attention: what is asked for (``plans``), the interface (``backend``), and which backend a model gets
when it is loaded (``selection``)."""

"""Paged attention behind one interface (``backend``); one that suits is picked when a model is loaded."""

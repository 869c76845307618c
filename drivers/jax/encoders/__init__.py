"""Encoders, which have no cache: the model, its engine, and how it is loaded."""

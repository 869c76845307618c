"""Guessing tokens, by lookup or by a draft model, and verifying them in one pass where that pays."""

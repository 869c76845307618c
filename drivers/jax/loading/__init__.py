"""Putting a model together: ``requests`` refuses, ``plan`` finds the weights, ``loader`` does the rest."""

"""Putting a model together: ``requests`` refuses, ``plan`` finds the weights, ``loader`` does the rest with
``parts`` (what a replica is made of) and ``weights``; ``phases`` tells how far it is."""

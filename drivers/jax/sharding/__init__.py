"""One model over many devices, by a named mesh.

mesh.py         what a mesh asks of the devices and the model; which devices make which replica
rules.py        which axis of a parameter lies on which axes of the mesh, and the order of fused rows
collectives.py  what programs do where an array is one part of several; how logits are cut
sequence.py     attention over pages that are spread over devices
placement.py    where arrays are put and how programs are compiled: on one device, or over a mesh
stages.py       which layers a pipeline stage has, and its place (its programs are in ../pipeline/)

A program over a mesh is the one-device program of a smaller model (fewer heads, a slice of each MLP, some
of the experts), run by every device under ``jax.shard_map``, with a sum over the mesh after each
row-parallel product. So attention backends, paged caches and quantised products need no second version,
and nothing is left to the compiler's guess at where data should be.
"""

"""The JAX driver: decoder models on CPU, GPU or TPU, executed in quanta over a paged KV cache.

Read in this order: ``driver`` (the callbacks), ``loading`` (puts a model together), ``execution`` (the life
of a quantum: what is on the device, what the host knows of every slot, what is compiled ahead), ``decoder``
(the model in nnx, and one pass through it), ``attention`` (backends), ``sampling``, ``paging`` (KV pages,
and their way to RAM and back), ``speculation``, ``adapters``, ``families`` (one file per model family) and
``weights`` (files). ``encoders`` embed and classify texts, without any cache. ``sharding`` cuts a model
over devices, and ``pipeline`` runs its layers in stages; ``native`` has kernels in C++ and CUDA,
``parking`` moves idle models to RAM, and ``platform`` makes the settings of the process.
"""

"""The JAX driver: decoder models on CPU, GPU or TPU, executed in quanta over a paged KV cache.

Read in this order: ``driver`` (the callbacks), ``loader`` (puts a model together: ``requests`` refuses,
``plan`` finds the weights, ``parameters`` and ``sizing`` say how large), ``engine`` (the life of a quantum:
``packing``, ``admission``, ``results``), ``replica`` (what one model has on its devices), ``ledger`` (what
the host knows of every slot; all validation), ``programs`` (what is compiled ahead, for which buckets;
``rehearsal`` runs them once), ``forward`` (the two model steps), ``state`` and ``sampling`` (the batch on the
device), ``modules`` (the decoder in nnx, of ``layers`` and ``experts``), ``attention`` (backends),
``families`` (one file per model family) and ``weights``. ``encoder`` and ``families.bert`` embed and classify
texts, without any cache; ``encoder_loader`` and ``encoder_engine`` serve them. ``sharding`` cuts a model over
devices, and ``pipeline`` runs its layers in stages.
"""

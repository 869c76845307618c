"""One model in pipeline stages: each has some of the layers, on devices of its own (see sharding/stages.py).

steps.py     what runs on the devices: the first stage's step, a later one's, and what comes back to the first
recipes.py   what the programs of a stage are
programs.py  the programs of all stages as one: dispatched in order, and the device queues overlap them
parts.py     what the loader puts an engine with stages together of

Every stage has programs of its own, and activations are copied from its devices to the next one's. One
program over all stages, with a permutation between them, would have to be the same on every stage, with as
many layers of each kind, and an embedding and a head on each. Programs of their own take any layers, and
leave the schedule to the host: it is the order of dispatching.

A step is cut into microbatches (Huang et al., 2019), as many as there are stages. When one of a decode step
has left the last stage, its tokens are sampled there and go back to the first, which waits for them only when
that microbatch's next step is due. So while a batch decodes no stage has to wait, and the pipeline is filled
and drained once, not in every step. A chunk of a prompt is cut into as many calls, which follow each other.
"""

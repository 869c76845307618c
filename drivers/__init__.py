"""Device drivers: processes that own devices and execute quanta.

sdk/    the loop and the message types; a driver's author writes a class of callbacks
null/   a full driver without a model, for tests and for measuring everything else
jax/    models in flax, sharded by jax.jit over CPU, GPU and TPU meshes
"""

"""Native kernels for the CPU: products, and paged attention for one new token per row and for many, gates,
and the choice of tokens.

``kernels.cc`` is compiled on first use for the processor at hand (``build``, which imports no jax), tried
against NumPy, and registered with jax as foreign functions (``kernels``). Where there is no compiler, or the
trial fails, everything runs on XLA's own code as before.
"""

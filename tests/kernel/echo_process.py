"""The echo service of the tests as a process of its own, so that it can be killed."""

from __future__ import annotations

from tests.kernel.test_kernel_process import Echo

if __name__ == "__main__":
    Echo().serve()

"""The benchmark suite: one harness, every peer, results as data. Run it with ``python -m benchmarks``."""

import os

# OpenBLAS's threads spin for 2^28 cycles after a call, on the cores of the next provider; now for 2^4.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

"""The benchmark suite: one harness, every peer, results as data. Run it with ``python -m benchmarks``."""

"""Who keeps how much at equal task loss: ``python -m benchmarks.retention``.

Every method trains on the same batches and is judged several times on the way: methods that learn at different speeds
can only be compared where they have learned the same.
"""

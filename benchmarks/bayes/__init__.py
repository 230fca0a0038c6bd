"""Whose probabilities are honest after fine-tuning on few examples: ``python -m benchmarks.bayes``.

A model learns from a few dozen questions and answers, and is asked others with four choices; the probability of a
choice is its likelihood over that of all four. Each method gives such probabilities, and all of them are recorded.
"""

"""Questions about a model: which layers, whose weights, which wrappers, and why not."""

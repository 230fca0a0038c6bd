"""What the rest stands on: environment, files, tensors as bytes, processes, the log, the compiled extension."""

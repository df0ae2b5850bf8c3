"""Training with the compression frozen."""

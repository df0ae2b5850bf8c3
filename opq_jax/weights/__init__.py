"""Weights in files of other formats."""

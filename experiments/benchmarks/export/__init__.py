"""Compressed networks in other runtimes."""

"""The `opq` command: one module a command, and the parts that they share."""

from opq_jax.cli.command import main

__all__ = ['main']

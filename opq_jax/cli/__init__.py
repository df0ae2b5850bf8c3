"""The `opq` command."""

from opq_jax.cli.command import main

__all__ = ['main']

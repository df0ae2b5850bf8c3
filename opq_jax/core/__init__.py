"""Helpers of every room: parameter trees, files that appear whole, compiled loops, warnings.

The door is a list of modules, and none of them imports JAX before it is used.
"""

from opq_jax.core import lazy

__all__ = [
  *('axes', 'extras', 'files', 'lazy', 'limits', 'memory', 'messages', 'native'),
  *('plain_trees', 'stored_leaves', 'trees'),
]

__getattr__, __dir__ = lazy.attributes(__name__, {}, __all__)

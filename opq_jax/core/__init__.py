"""Helpers of every room: parameter trees, files that appear whole, compiled loops, warnings.

The door is a list of modules, and none of them imports JAX before it is used.
"""

__all__ = ['files', 'limits', 'messages', 'native', 'trees']

"""Loaded leaves over the devices of a mesh, as the leaves of another tree lie there."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped

from opq_jax.compression import LeafState


def laid_out(
  value: Shaped[np.ndarray, '...'], record: LeafState | None, like: Any
) -> tuple[Any, LeafState | None]:
  """Lays a leaf and its state over a mesh: kinds as the leaf, all else on every device.

  Args:
    value: the leaf, on the host of every process.
    record: its state; None where it is not compressed.
    like: a leaf with a `NamedSharding`; any other leaves value and state as they are.

  Returns:
    The leaf and its state.  A leaf that JAX would narrow (float64 and int64 without
    `jax_enable_x64`) stays on the host.

  Raises:
    ValueError: the sharding does not divide the shape.
  """
  sharding = getattr(like, 'sharding', None)
  if not isinstance(sharding, NamedSharding):
    return value, record
  if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
    return value, record
  if record is not None:
    everywhere = NamedSharding(sharding.mesh, P())
    arrays: dict[str, Any] = {
      field: _on_devices(getattr(record, field), sharding if field == 'kinds' else everywhere)
      for field in ('kinds', 'codebook', 'threshold', 'step', 'levels', 'output_scales')
      if getattr(record, field) is not None
    }
    record = dataclasses.replace(record, **arrays)
  return _on_devices(value, sharding), record


def check_like(
  label: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
  """Checks that a tree has the paths and shapes of a file.

  Args:
    label: the name of the file in messages.
    found: the shapes of the tree by path.
    expected: those of the file.

  Raises:
    ValueError: a path or a shape is another one; all are listed.
  """
  lines = [
    f'  {name}: found {found.get(name, "nothing")}, expected {expected.get(name, "nothing")}'
    for name in dict.fromkeys([*expected, *found])
    if found.get(name) != expected.get(name)
  ]
  if lines:
    raise ValueError('\n'.join([f'`like` is another tree than {label} holds:', *lines]))


def _on_devices(array: Any, sharding: Sharding) -> jax.Array:
  """Returns an array that every process has, over the devices of all of them."""
  host = np.asarray(array)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

"""Files of leaves whose inputs are rotated."""

import math

import jax
import numpy as np

import opq_jax
from opq_jax.coding import rotations
from opq_jax.file.coded_leaves import Rotation
from opq_jax.file.coded_weights import coded_slices
from opq_jax.file.front import front_bytes
from opq_jax.file.written_leaves import axes_of, write_leaf


def rotated_parts(weights, axis, slices=0, bits=3.0):
  """The slices of a leaf, each rounded once its inputs are rotated; the axis is that of a slice."""
  parts = []
  for index in np.ndindex(weights.shape[:slices]):
    turned = {'w': rotations.rotated(weights[index], axis)}
    allocation = opq_jax.allocate(
      turned, bits_per_weight=bits, compressible=lambda path, leaf: True
    )
    state = opq_jax.init_state(turned, allocation)
    values = jax.device_get(opq_jax.apply_compression(turned, state)['w'])
    (coded,) = coded_slices('w', values, state.tree['w'])
    parts.append(coded._replace(rotation=Rotation(axis, weights.dtype)))
  return parts


def file_of(leaves, metadata=None):
  """The bytes of a file of leaves by name: (parts, slices)."""
  payloads, specs, grids = [], {}, []
  for name, (parts, slices) in sorted(leaves.items()):
    shape = (*([len(parts)] if slices else []), *parts[0].codes.shape)
    axes = axes_of(parts)
    written = write_leaf(parts, shape, slices, payloads.append, contexts=True, axes=axes)
    specs[name] = written.spec
    grids += written.grids
  front = front_bytes(specs, grids, sum(map(len, payloads)), [], metadata or {}, '2')
  return b''.join([front, *payloads])


def dense_rotation(inputs):
  """Q as a matrix of float64, from Sylvester's matrices."""
  from scipy.linalg import hadamard

  size = 2 ** int(math.log2(inputs))
  first, last = np.eye(inputs), np.eye(inputs)
  first[:size, :size] = last[-size:, -size:] = hadamard(size) / math.sqrt(size)
  signs = rotations.signs(2 * inputs).astype(np.float64)
  if size == inputs:
    return np.diag(signs[:inputs]) @ first
  return np.diag(signs[:inputs]) @ first @ np.diag(signs[inputs:]) @ last

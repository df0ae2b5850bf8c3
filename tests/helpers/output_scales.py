"""Leaves whose outputs have scales, and their states."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import opq_jax
from opq_jax.coding.output_scales import scales_of


def scales_along(shape, axis, slices=0, seed=0, spread=8):
  """Scales of the outputs along an axis, as they broadcast over a leaf; axis and slices of it."""
  own = [n if i == axis or i < slices else 1 for i, n in enumerate(shape)]
  codes = np.random.default_rng(seed).integers(-spread, spread + 1, own)
  return scales_of(codes.astype(np.int8))


def scaled_state(weights, scales, slices=0, bits=3.0):
  """The state of a leaf on the grid that is allocated for its weights over the scales."""
  allocation = opq_jax.allocate(
    np.asarray(weights, np.float32) / scales,
    bits_per_weight=bits,
    slices=lambda path, leaf: slices,
    compressible=lambda path, leaf: True,
  )
  allocation = dataclasses.replace(
    allocation, tree=dataclasses.replace(allocation.tree, output_scales=scales)
  )
  return opq_jax.init_state(jnp.asarray(weights), allocation).tree


def unlike(shape, scales, seed=0, dtype=np.float32, outliers=2):
  """Laplace weights whose outputs differ as the scales do, with a few outliers."""
  rng = np.random.default_rng(seed)
  weights = rng.laplace(size=shape)
  for _ in range(outliers):
    weights[tuple(rng.integers(0, n) for n in shape)] = rng.choice([-1, 1]) * rng.uniform(300, 900)
  return (weights * scales).astype(dtype)

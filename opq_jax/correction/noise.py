"""Noise in place of images, for measuring a network without any data."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32


def natural_noise(
  key: Array, shape: Sequence[int], power: float = 1.0, colour: float = 0.3
) -> Float32[Array, 'batch height width channels']:
  """Draws Gaussian noise of mean 0 and variance 1 with the spectrum of photographs.

  White noise is scaled by f^-power at every spatial frequency f.  In photographs the amplitude
  falls as 1/f (Field, "Relations between the statistics of natural images and the response
  properties of cortical cells", JOSA A 1987), so neighbouring pixels are correlated; so are colour
  channels.

  Args:
    key: of the noise.
    shape: (examples, height, width, channels).
    power: of the spectrum; 0 is white.
    colour: share of each channel's variance that is independent of the other channels.

  Returns:
    Noise of this shape, float32.

  >>> noise = natural_noise(jax.random.key(0), (4, 32, 32, 3))
  >>> round(float(noise.var()), 2), bool((noise[:, 1:] * noise[:, :-1]).mean() > 0.5)
  (1.0, True)
  """
  return _natural_noise(key, tuple(shape), power, colour)


# one program a shape, in place of one an operation
@functools.partial(jax.jit, static_argnames=('shape', 'power', 'colour'))
def _natural_noise(key: Array, shape: tuple[int, ...], power: float, colour: float) -> Array:
  height, width, channels = shape[1:]
  white = jax.random.normal(key, shape, jnp.float32)
  common = jnp.mean(white, axis=-1, keepdims=True) * math.sqrt(channels)
  mixed = math.sqrt(1 - colour) * common + math.sqrt(colour) * white
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
  # frequency 0, an image's mean, is scaled as the lowest other frequency
  scale = np.maximum(frequency, 1 / max(height, width)) ** -power
  spectrum = jnp.fft.fft2(mixed, axes=(1, 2)) * scale.astype(np.complex64)[None, :, :, None]
  noise = jnp.real(jnp.fft.ifft2(spectrum, axes=(1, 2)))
  return noise / jnp.std(noise)


def noise_inputs(key: Array, shape: Sequence[int]) -> Float32[Array, 'batch ...']:
  """Draws a batch of noise of mean 0 and variance 1: `natural_noise` of four axes, else white.

  Raises:
    ValueError: the shape is no batch of two inputs or more, which batch statistics need.
  """
  shape = tuple(shape)
  if len(shape) < 2 or shape[0] < 2 or any(size < 1 for size in shape):
    raise ValueError(
      f'input_shape: found {shape}, expected (examples, …, channels) with at least 2 examples'
    )
  if len(shape) == 4:
    return natural_noise(key, shape)
  return jax.random.normal(key, shape, jnp.float32)

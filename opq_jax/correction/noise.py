"""Noise in the place of images, for what a network shows of itself without any data."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32


def natural_noise(
  key: Array, shape: Sequence[int], power: float = 1.0, colour: float = 0.3
) -> Float32[Array, 'batch height width channels']:
  """Gaussian noise of mean 0 and variance 1 with the spectrum of photographs, and nothing else.

  White noise, each frequency f of which is scaled by f^-power: in photographs the amplitude falls
  as 1/f (Field, "Relations between the statistics of natural images and the response properties
  of cortical cells", JOSA A 1987), so neighbours resemble each other.  So do colours.

  Args:
    key: of the noise.
    shape: (examples, height, width, channels).
    power: of the spectrum; 0 is white.
    colour: share of the variance that is each channel's own; the rest they have in common.

  >>> noise = natural_noise(jax.random.key(0), (4, 32, 32, 3))
  >>> round(float(noise.var()), 2), bool((noise[:, 1:] * noise[:, :-1]).mean() > 0.5)
  (1.0, True)
  """
  height, width, channels = shape[1:]
  white = jax.random.normal(key, tuple(shape), jnp.float32)
  common = jnp.mean(white, axis=-1, keepdims=True) * math.sqrt(channels)
  mixed = math.sqrt(1 - colour) * common + math.sqrt(colour) * white
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
  # the mean of an image counts as its lowest frequency
  scale = np.maximum(frequency, 1 / max(height, width)) ** -power
  spectrum = jnp.fft.fft2(mixed, axes=(1, 2)) * scale.astype(np.complex64)[None, :, :, None]
  noise = jnp.real(jnp.fft.ifft2(spectrum, axes=(1, 2)))
  return noise / jnp.std(noise)


def of_shape(key: Array, shape: Sequence[int]) -> Float32[Array, 'batch ...']:
  """A batch of noise of mean 0 and variance 1: `natural_noise` of four axes, else white.

  Raises:
    ValueError: the shape is no batch of inputs.
  """
  found = tuple(shape)
  if len(found) < 2 or found[0] < 2 or any(size < 1 for size in found):
    raise ValueError(
      f'input_shape: found {found}, expected (examples, …, channels) with at least 2 examples'
    )
  if len(found) == 4:
    return natural_noise(key, found)
  return jax.random.normal(key, found, jnp.float32)

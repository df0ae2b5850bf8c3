import jax
import numpy as np

import opq_jax


def test_natural_noise_has_its_spectrum():
  noise = np.asarray(opq_jax.correction.natural_noise(jax.random.key(0), (64, 32, 32, 3)))
  assert noise.dtype == np.float32
  spectrum = np.square(np.abs(np.fft.fft2(noise, axes=(1, 2)))).mean((0, 3))
  # amplitudes fall as 1 / f: powers as 1 / f^2
  np.testing.assert_allclose(spectrum[0, 2] / spectrum[0, 8], 16, rtol=0.4)
  colours = np.corrcoef(noise.reshape(-1, 3).T)
  np.testing.assert_allclose(colours[np.triu_indices(3, 1)], 0.7, atol=0.25)

"""Compresses a small network in a process of its own: `python fresh_run.py OUT DEVICES`."""

import sys
import warnings

import jax
import numpy as np

import opq_jax


def network():
  draw = np.random.default_rng(0).laplace
  return {
    'conv': {'kernel': draw(size=(3, 3, 8, 16)).astype(np.float32), 'bias': np.ones(16, 'f4')},
    'dense': {'kernel': draw(size=(64, 10)).astype(np.float16)},
    'steps': np.int32(7),
  }


def save(path):
  params = network()
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'the Laplace density')
    allocation = opq_jax.allocate(params, compression_rate=9.0)
  opq_jax.save(path, params, opq_jax.init_state(params, allocation), {'from': 'a test'})


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', int(sys.argv[2]))
  assert jax.device_count() == int(sys.argv[2])
  save(sys.argv[1])

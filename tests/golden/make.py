"""Makes the golden files of the present version of the format: `python tests/golden/make.py`.

    NAME.opq           a network of every kind of leaf and container, small
    NAME.safetensors   what `opq_jax.load` must make of it, for ever: the leaves by name, and
                       <name>:mask, :codebook, :threshold, :step, :levels, :codes

NAME is `version_N`, and `version_N_contexts` where codes are those of `context_coding`.  Run once
for each version of the format, when it is made; files that are there are never made again.
"""

import pathlib

import flax.core
import ml_dtypes
import numpy as np
import safetensors.numpy

import opq_jax
from opq_jax import artifact_index

FOLDER = pathlib.Path(__file__).parent
METADATA = {'weights': 'golden', 'é': '[{"'}


def network(smooth: bool) -> dict[str, object]:
  """Laplace kernels in three dtypes, a leaf of zeros, one without elements, and all containers."""
  draw = np.random.default_rng(0).laplace
  kernel = draw(size=(3, 3, 8, 16))
  if smooth:
    kernel = np.cumsum(np.cumsum(kernel, 0), 1)
  return {
    'params': {
      'conv': {
        'kernel': kernel.astype(np.float32),
        'bias': draw(size=16).astype(np.float32),
      },
      'dense': flax.core.freeze({'kernel': draw(size=(16, 24)).astype(ml_dtypes.bfloat16)}),
      'half': [draw(size=(24, 10)).astype(np.float16), None, (np.float32(-0.0),)],
      'zeros': np.zeros((6, 4), np.float32),
      'empty': np.zeros((0, 3), np.float32),
      'numbers': {7: np.array([np.nan, np.inf, 1e-42], np.float64), -1: {':': np.int8(3)}},
    },
    'batch_stats': {'mean': draw(size=16).astype(np.float32), 'var': np.full(16, 0.5, np.float32)},
    'steps': np.int64(1 << 40),
    'is_trained': np.array([True, False]),
  }


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All that a file holds, by name."""
  found = {}
  with opq_jax.OpqFile(path) as file:
    for name, leaf in file.items():
      found[name] = leaf
      if (record := file.leaf_state(name)) is not None:
        fields = ('mask', 'codebook', 'threshold', 'step', 'levels')
        found |= {f'{name}:{field}': np.asarray(getattr(record, field)) for field in fields}
        found[f'{name}:codes'] = file.codes(name)
  return found


def main() -> None:
  for contexts, name in ((False, 'version_{}'), (True, 'version_{}_contexts')):
    stem = FOLDER / name.format(artifact_index.VERSION)
    if stem.with_suffix('.opq').exists():
      continue
    params = network(smooth=contexts)
    state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=9.0))
    opq_jax.save(stem.with_suffix('.opq'), params, state, METADATA, contexts=contexts)
    data = safetensors.numpy.save(arrays(stem.with_suffix('.opq')))
    stem.with_suffix('.safetensors').write_bytes(data)


if __name__ == '__main__':
  main()

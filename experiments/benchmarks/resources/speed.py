"""Speed and memory of allocate and apply_compression on a tree of ResNet-50's shapes.

    python -m experiments.benchmarks.resources.speed

Every figure is a ratio to a jitted pass over the same tree in the same run, since absolute times on
a shared machine vary.  Peak memory is the resident set above the input tree, after compiling.
"""

import ctypes
import functools
import gc
import time

import jax
import jax.numpy as jnp

import opq_jax
from experiments.benchmarks import harness

TARGETS = {
  'compression_rate=12.8': {'compression_rate': 12.8},
  'sparsity=0.74, bits=3': {'sparsity': 0.74, 'bits': 3.0},
}


def status(field: str) -> int:
  """Returns a field of the process's memory status, in bytes."""
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_above(function) -> int:
  """Returns the peak of the resident set during a call, above its value before, in bytes."""
  gc.collect()
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')
  before = status('VmRSS')
  kept = jax.block_until_ready(function())
  peak = status('VmHWM')
  del kept
  return peak - before


def main() -> None:
  params = harness.random_tree(harness.resnet50_shapes())
  weights = sum(leaf.size for leaf in params.values())
  sum_abs = jax.jit(lambda tree: sum(jnp.sum(jnp.abs(leaf)) for leaf in tree.values()))
  rows = []

  for name, target in TARGETS.items():
    for corrected in (False, True):
      allocate = functools.partial(opq_jax.allocate, params, corrected=corrected, **target)
      start = time.perf_counter()
      jax.block_until_ready(allocate())
      first = time.perf_counter() - start
      seconds = harness.in_turn({'pass': lambda: sum_abs(params), 'allocate': allocate})
      rows.append(
        {
          'what': f'allocate({name}), ' + ('corrected' if corrected else 'closed forms'),
          'ratio': round(seconds['allocate'] / seconds['pass'], 2),
          'to': 'a pass of sum |w|',
          'first call, seconds': round(first, 2),
        }
      )

  state = opq_jax.init_state(params, opq_jax.allocate(params, compression_rate=12.8))
  masks = {name: leaf.mask for name, leaf in state.tree.items()}
  masked = jax.jit(lambda tree, masks: jax.tree.map(lambda w, m: w * m, tree, masks))
  seconds = harness.in_turn(
    {
      'masked copy': lambda: masked(params, masks),
      'apply': lambda: opq_jax.apply_compression(params, state),
    },
    rounds=31,
  )
  rows.append(
    {
      'what': 'apply_compression',
      'ratio': round(seconds['apply'] / seconds['masked copy'], 2),
      'to': 'a masked copy, w * mask',
    }
  )

  def all_of_it():
    allocation = opq_jax.allocate(params, compression_rate=12.8)
    state = opq_jax.init_state(params, allocation)
    return allocation, state, opq_jax.apply_compression(params, state)

  del state, masks
  jax.block_until_ready(all_of_it())
  peak = max(peak_above(all_of_it) for _ in range(3))
  rows.append(
    {
      'what': 'peak memory of allocate + init_state + apply_compression',
      'ratio': round(peak / (4 * weights), 2),
      'to': 'the bytes of the tree, above it',
    }
  )

  harness.report(
    'speed',
    f'ResNet-50 shapes, {weights / 1e6:.1f} M weights',
    'python -m experiments.benchmarks.resources.speed',
    rows,
  )


if __name__ == '__main__':
  main()

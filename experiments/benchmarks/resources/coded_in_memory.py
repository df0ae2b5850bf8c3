"""Memory and seconds of a language model whose weights stay coded, beside floats.

    python -m experiments.benchmarks.resources.coded_in_memory [--sizes 135M 1B] [--timed 135M]

The layers of a random Llama network, stacked and run by a scan that decodes one layer at a time
(`opq_jax.coded`).  Memory is what XLA plans for the compiled program (arguments: weights, codes and
codebooks; temporary: activations and what is decoded); no weight is made for it.  Seconds are
medians of runs in turn, in one process, for 1 token and for 64.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks.language_models import random_folder
from opq_jax import models
from opq_jax.compression import CodedLeaf, LeafState, decoded
from opq_jax.compression.records import affine_codebook
from opq_jax.core.trees import PyTree
from opq_jax.language.parts import Block, Start

FORMS = 'float32', 'bfloat16', 'codes of 8 bits', 'codes of 4 bits'
TOKENS = 1, 64
_LEVELS = {'codes of 8 bits': 60, 'codes of 4 bits': 7}


def layers_of(model: models.Decoder, form: str, make: Callable[..., Any]) -> PyTree:
  """Returns the stacked layers of a model in some form.

  Args:
    model: the network.
    form: one of `FORMS`.
    make: returns an array of a shape, a dtype and the bound of its integers.
  """

  def leaf(shape: tuple[int, ...]) -> Any:
    if len(shape) < 3 or form in ('float32', 'bfloat16'):
      return make(shape, jnp.bfloat16 if form == 'bfloat16' else jnp.float32, 0)
    depth, levels = shape[:1], _LEVELS[form]
    step = np.full(depth, 0.01, np.float32)
    grid = LeafState(
      kinds=make((*depth, 0), jnp.uint8, 1),
      codebook=affine_codebook(step / 2, step, np.full(depth, levels, np.int32)),
      threshold=step / 2,
      step=step,
      levels=np.full(depth, levels, np.int32),
      dtype=np.dtype(jnp.bfloat16),
    )
    is_packed = form == 'codes of 4 bits'
    codes = (
      make((*shape[:-1], shape[-1] // 2), jnp.uint8, 127)
      if is_packed
      else make(shape, jnp.int8, levels)
    )
    none = (*depth, 0)
    places, escaped = make(none, jnp.int32, 1), make(none, jnp.bfloat16, 0)
    return CodedLeaf(codes, grid, places, escaped, shape[-1] if is_packed else None)

  shapes = models.variable_shapes(model)['params']['layers']
  return jax.tree.map(lambda array: leaf(array.shape), shapes)


def program(model: models.Decoder) -> Callable[..., Any]:
  """Returns a compiled function (layers, hidden states, context) -> hidden states."""
  block = Block(model)

  def run(layers: PyTree, x: Any, context: Any) -> Any:
    wide = lambda layer: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), decoded(layer))
    step = lambda x, layer: (block(wide(layer), x, context), None)
    return jax.lax.scan(step, x, layers)[0]

  return jax.jit(run)


def inputs(model: models.Decoder, tokens: int) -> tuple[Any, Any]:
  """Returns hidden states of random tokens before the layers, and the context of a layer."""
  small = model.clone(vocabulary=64)
  shapes = models.variable_shapes(small)['params']
  outer = {
    name: jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree)
    for name, tree in shapes.items()
    if name != 'layers'
  }
  return Start(small)(outer, jnp.zeros((1, tokens), jnp.int32))


def planned(size: str) -> list[dict[str, Any]]:
  """Returns the memory of every form at one size."""
  model = models.from_config(random_folder.config(size)).clone(dtype=jnp.float32)
  abstract = lambda shape, dtype, bound: jax.ShapeDtypeStruct(shape, dtype)
  x, context = inputs(model, TOKENS[0])
  rows = []
  for form in FORMS:
    layers = layers_of(model, form, abstract)
    plan = program(model).lower(layers, x, context).compile().memory_analysis()
    rows.append(
      {
        'network': size,
        'weights': form,
        'arguments, MB': round(plan.argument_size_in_bytes / 1e6),
        'temporary, MB': round(plan.temp_size_in_bytes / 1e6),
      }
    )
  return rows


def seconds(size: str) -> dict[str, dict[str, float]]:
  """Returns the seconds of every form, by the number of tokens."""
  model = models.from_config(random_folder.config(size)).clone(dtype=jnp.float32)
  rng = np.random.default_rng(0)

  def drawn(shape: tuple[int, ...], dtype: Any, bound: int) -> Any:
    if bound:
      low = 0 if jnp.issubdtype(dtype, jnp.unsignedinteger) else -bound
      return jnp.asarray(rng.integers(low, bound + 1, shape), dtype)
    return jnp.asarray(rng.normal(size=shape, scale=0.02), dtype)

  forms = {form: layers_of(model, form, drawn) for form in FORMS}
  run = program(model)
  found: dict[str, dict[str, float]] = {form: {} for form in FORMS}
  for tokens in TOKENS:
    x, context = inputs(model, tokens)
    calls = {form: functools.partial(run, layers, x, context) for form, layers in forms.items()}
    timed = harness.in_turn(calls, rounds=7)
    for form, time in timed.items():
      found[form][f'{tokens} tokens' if tokens > 1 else '1 token'] = time
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--sizes', nargs='+', choices=random_folder.SIZES, default=['135M', '1B'])
  parser.add_argument('--timed', nargs='*', choices=random_folder.SIZES, default=['135M'])
  arguments = parser.parse_args()
  rows = []
  for size in arguments.sizes:
    times = seconds(size) if size in arguments.timed else {}
    for row in planned(size):
      own, base = times.get(row['weights'], {}), times.get(FORMS[0], {})
      ratios = {f'{name}, over float32': round(own[name] / base[name], 2) for name in own}
      rows.append(row | ratios)
  harness.report(
    'coded_in_memory',
    'layers of a language model in memory, floats and codes',
    'python -m experiments.benchmarks.resources.coded_in_memory',
    rows,
  )


if __name__ == '__main__':
  main()

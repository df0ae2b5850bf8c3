"""What a file holds that a correction could still move to fit its compressed weights.

`opq compress` runs, and so corrects, the networks of `opq_jax.models` alone.  Of any other network
it has only the weights: their names say whether there is something to correct, and with what.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from opq_jax.allocation.leaf_names import biases_beside_kernels, kind_of_name

# endings of a normalization's running mean and variance, and what corrects them
_STATISTICS = (
  ('running_mean', 'running_var', 'torch'),
  ('mean_ema/average', 'var_ema/average', 'from_haiku'),
  # of Linen; `from_nnx` makes such a tree of an NNX module
  ('mean', 'var', 'correct_batch_norm'),
  ('moving_mean', 'moving_variance', ''),  # Keras and TF-slim: no library of ours runs these
)
_BOX = re.compile(r'(/(raw_)?value|:0)$')  # of a variable of NNX or Keras
_ROOM = 'opq_jax.correction'


class Uncorrected(NamedTuple):
  """Leaves that no longer fit the compressed weights.

  Attributes:
    kind: `statistics` of normalizations, or `biases` of layers.
    paths: of the running means, or of the biases.
    correct_with: name of the function of `opq_jax.correction`, '' where only `--model` can.
  """

  kind: str
  paths: tuple[str, ...]
  correct_with: str

  def line(self) -> str:
    """Returns one line that says what is not corrected, and what to do about it."""
    count = len(self.paths)
    of_known = 'a network that `opq compress --help` lists is corrected with --model NAME'
    if self.kind == 'biases':
      what = f'{count} biases of layers' if count > 1 else '1 bias of a layer'
      inputs = 'inputs=[...]' if self.correct_with.endswith('torch') else '[...]'
      return (
        f'{what} ({self.paths[0]}) not corrected for the compressed weights: '
        f'{self.correct_with}(..., {inputs}) does that with a few unlabelled inputs'
      )
    what = f'statistics of {count} normalizations' if count > 1 else 'statistics of a normalization'
    what = f'{what} ({self.paths[0]}) not corrected for the compressed weights'
    if not self.correct_with:
      return f'{what}, which costs accuracy: {of_known}'
    return (
      f'{what}, which costs accuracy: {self.correct_with} does that without data, on the '
      f'decompressed network; {of_known}'
    )


def uncorrected(paths: Iterable[str], compressed: Collection[str]) -> Uncorrected | None:
  """Returns what could be corrected in a network, None where there is nothing.

  Biases count where there are no statistics, beside a compressed kernel.

  Args:
    paths: of all leaves.
    compressed: paths of the compressed leaves.

  >>> uncorrected(['conv.weight', 'bn.running_mean', 'bn.running_var'], ['conv.weight'])[:2]
  ('statistics', ('bn.running_mean',))
  >>> uncorrected(['fc.weight', 'fc.bias', 'norm.bias'], ['fc.weight']).paths
  ('fc.bias',)
  >>> uncorrected(['fc.weight', 'norm.bias'], ['fc.weight']) is None
  True
  """
  paths = list(paths)
  if not compressed:
    return None
  bare = {_BOX.sub('', path): path for path in paths}
  for mean, var, function in _STATISTICS:
    ending = re.compile(rf'(^|(?<=[/.])){re.escape(mean)}$')
    means = [
      path for name, path in bare.items() if ending.search(name) and ending.sub(var, name) in bare
    ]
    if means:
      return Uncorrected('statistics', tuple(means), function and f'{_ROOM}.{function}')
  kernels = {_layer(path) for path in compressed}
  by_letter = set(biases_beside_kernels(paths))
  biases = [
    path
    for path in paths
    if path not in compressed and (kind_of_name(path) == 'biases' or path in by_letter)
    if _layer(path) in kernels
  ]
  if not biases:
    return None
  # names of PyTorch's state dicts have dots
  function = 'torch' if all('.' in path for path in biases) else 'correct_on_images'
  return Uncorrected('biases', tuple(biases), f'{_ROOM}.{function}')


def uncorrected_in(
  metadata: Mapping[str, str], paths: Iterable[str], compressed: Collection[str]
) -> dict[str, Any] | None:
  """Returns `uncorrected` of a file that `opq compress` wrote, for `json.dumps`.

  None also where BatchNorm was corrected, or was left alone on demand.
  """
  if 'opq_jax' not in metadata or 'batch_norm' in metadata:
    return None
  found = uncorrected(paths, compressed)
  return found and found._asdict()


def _layer(path: str) -> str:
  """Returns the place of a leaf's layer."""
  return _BOX.sub('', path).rpartition('.' if '.' in path else '/')[0]

"""The axis of a leaf's output channels, by the naming conventions of the frameworks."""

import re
from typing import Any, Literal

import numpy as np

ChannelMode = Literal['auto', 'first', 'last']


def channel_axis(path: str, leaf: Any, mode: ChannelMode = 'auto') -> int:
  """Returns the axis of a leaf's output channels, for `opq_jax.allocate`.

  JAX, Keras and TensorFlow put the output channel last.  PyTorch and Equinox call their leaves
  `weight` and put it first, except in embedding tables [vocabulary, dim], where it is the last
  axis.  TensorFlow's depthwise kernels [height, width, channels, 1] have it before a last axis of
  length 1.

  A name does not tell whether a PyTorch layer is transposed (ConvTranspose, the Conv1D of GPT-2);
  choose 'last' for these.

  Args:
    path: the leaf's name.
    leaf: anything with a shape.
    mode: 'auto' decides by the name; 'first' and 'last' hold for every leaf.

  Returns:
    0, -1 or -2.

  Raises:
    ValueError: an unknown mode.

  >>> kernel, table = np.zeros((16, 3, 3, 3)), np.zeros((1000, 64))
  >>> channel_axis('conv1.weight', kernel), channel_axis('params/conv/kernel', kernel)
  (0, -1)
  >>> channel_axis('embed_tokens.weight', table), channel_axis('classifier.weight', table)
  (-1, 0)
  """
  if mode not in ('auto', 'first', 'last'):
    raise ValueError(f'{path}: found mode {mode!r}, expected auto, first or last')
  if mode != 'auto':
    return 0 if mode == 'first' else -1
  *modules, name = re.split(r'[./]', path)
  module, shape = modules[-1].lower() if modules else '', np.shape(leaf)
  if name.endswith('weight'):
    # wte and wpe: GPT-2's tables of tokens and positions
    is_table = len(shape) == 2 and ('emb' in module or module in ('wte', 'wpe'))
    return -1 if is_table else 0
  if 'depthwise' in name and len(shape) == 4 and shape[-1] == 1:
    return -2
  return -1

"""The axis of a leaf's output channels, by the naming conventions of the frameworks."""

import re
from typing import Any, Literal

import numpy as np

ChannelMode = Literal['auto', 'first', 'last']

# PyTorch's names of a layer's weights; the parts of weight normalization and of cells too
_TORCH = re.compile(r'.*weight(_(ih|hh|hr)_l\d+(_reverse)?|_orig|_v|_g|_u)?|.*parametrizations.*')
# tables [vocabulary, dim]; wte and wpe are GPT-2's, shared is T5's
_TABLE = re.compile(r'.*emb.*|wte|wpe|shared')
# kernels [inputs, outputs, window] of transposed convolutions
_TRANSPOSED = re.compile(r'(.*_)?(up|upconv|up_conv|deconv|upsample|.*transposed?)\d*')
# GPT-2's linear layers, which its own code has [inputs, outputs] and others [outputs, inputs]
_GPT2 = re.compile(r'c_(attn|fc|proj)')


def channel_axis(path: str, leaf: Any, mode: ChannelMode = 'auto') -> int:
  """Returns the axis of a leaf's output channels, for `opq_jax.allocate`.

  JAX, Keras and TensorFlow put the output channel last.  PyTorch and Equinox call their leaves
  `weight` and put it first, with these exceptions:

    tables [vocabulary, dim] (`emb...`, `wte`, `wpe`, `shared`)        the last axis
    transposed convolutions (`up`, `deconv`, `...transpose`)           the second axis
    GPT-2's `c_attn`, `c_fc`: more outputs than inputs                 the longer axis
    GPT-2's `c_proj`: no more outputs than inputs                      the shorter axis, or the last

  TensorFlow's depthwise kernels [height, width, channels, 1] have it before a last axis of length
  1.  Where a name does not tell (a transposed convolution that is called `conv`), choose the mode.

  Args:
    path: the leaf's name.
    leaf: anything with a shape.
    mode: 'auto' decides by the name; 'first' and 'last' hold for every leaf.

  Returns:
    0, 1, -1 or -2.

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
  if not _TORCH.fullmatch(path if 'parametrizations' in modules else name):
    is_depthwise = 'depthwise' in name and len(shape) == 4 and shape[-1] == 1
    return -2 if is_depthwise else -1
  if len(shape) == 2 and _TABLE.fullmatch(module):
    return -1
  if len(shape) > 2 and _TRANSPOSED.fullmatch(module):
    return 1
  if len(shape) == 2 and _GPT2.fullmatch(module):
    has_last_longer = shape[1] > shape[0]
    is_wide = module != 'c_proj'
    return -1 if shape[0] == shape[1] or has_last_longer == is_wide else 0
  return 0

"""Names of the releases before 0.2, which keep working for one release and warn.

`find` is the last resort of `opq_jax.__getattr__`.  The functions here have signatures that no
current function has, and stand on the encoders of today.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from opq_jax.core import messages

# room of each function and class that was a name of `opq_jax` itself
_MOVED = {
  'LeafAllocation': 'allocation',
  'LeafState': 'compression',
  'LeafStatistics': 'allocation',
  'SizeReport': 'report',
  'correct_batch_norm': 'correction',
  'correct_on_images': 'correction',
  'file_report': 'report',
  'fold_batch_norm': 'correction',
  'is_compressible': 'allocation',
  'leaf_statistics': 'allocation',
  'mean_moments': 'network',
  'merge_statistics': 'allocation',
  'natural_noise': 'correction',
  'read_weights': 'weights',
  'round_uncompressed': 'correction',
  'second_moments': 'network',
  'synthetic_inputs': 'correction',
  'write_safetensors': 'weights',
}
# today's place of each module that lay in the package's own folder; a room, where it was divided
_MODULES = {
  'accuracy': 'report.accuracy',
  'allocation_solver': 'allocation.solver',
  'ans': 'coding.ans',
  'artifact': 'file',
  'artifact_index': 'file.index',
  'augmentation': 'data.augmentation',
  'batch_norm': 'correction.batch_norm',
  'batch_statistics': 'correction.batch_statistics',
  'checkpoints': 'finetuning.checkpoints',
  'context_coding': 'coding.contexts',
  'demo': 'cli.demo',
  'entropy_coding': 'coding.payload',
  'escapes': 'coding.escapes',
  'feedback': 'encoders.feedback',
  'file_rate': 'file.rate',
  'files': 'core.files',
  'fixed_width': 'allocation.fixed_width',
  'histograms': 'allocation',
  'inference': 'correction.inference',
  'joined_statistics': 'allocation.joined_statistics',
  'keras_files': 'weights.keras',
  'laplace': 'allocation.laplace',
  'lattices': 'allocation.lattices',
  'layer_by_layer': 'encoders.layer_by_layer',
  'losses': 'finetuning.losses',
  'moments': 'network.moments',
  'native': 'core.native',
  'networks': 'importers.networks',
  'noise': 'correction.noise',
  'optimization': 'allocation',
  'orbax_files': 'weights.orbax',
  'paper': 'allocation.paper',
  'plots': 'report.plots',
  'rate_search': 'allocation',
  'sequential_ans': 'coding.sequential_ans',
  'sizes': 'report',
  'statistics': 'allocation',
  'stored_leaves': 'weights',
  'streaming': 'weights.streaming',
  'streams': 'data.streams',
  'synthetic': 'correction.synthetic',
  'tables': 'report',
  'training': 'finetuning',
  'transforms': 'compression.transforms',
  'trees': 'core.trees',
  'trellis': 'coding.trellis',
  'trellis_encoding': 'encoders.trellis',
  'trellis_grids': 'encoders.trellis',
  'verification': 'report.verification',
  'weight_files': 'weights',
}
_COMPRESS = 'opq_jax.compress(params, compression_rate=..., encoder=opq_jax.encoders.{})'
_CHOOSE = 'opq_jax.encoders.{}.choose_codes(params, state)'


def is_module(name: str) -> bool:
  """Returns whether `opq_jax.<name>` was a module of the last release."""
  return name in _MODULES


def find(name: str) -> Any:
  """Returns what `opq_jax.<name>` was in the last release, and warns with its new place.

  Raises:
    AttributeError: there was no such name.

  >>> import warnings
  >>> with warnings.catch_warnings(record=True) as caught:
  ...   warnings.simplefilter('always')
  ...   moved = find('second_moments')
  >>> str(caught[0].message)
  'opq_jax.second_moments is deprecated: use opq_jax.network.second_moments'
  """
  if name in _MOVED:
    place = f'opq_jax.{_MOVED[name]}'
    value = getattr(importlib.import_module(place), name)
    use = f'{place}.{name}'
  elif name in _MODULES:
    use = f'opq_jax.{_MODULES[name]}'
    value = importlib.import_module(use)
  elif name in _FUNCTIONS:
    value, use = _FUNCTIONS[name]
  else:
    raise AttributeError(f"module 'opq_jax' has no attribute {name!r}")
  messages.warn(f'opq_jax.{name} is deprecated: use {use}', DeprecationWarning)
  return value


def encode_with_feedback(
  params: Any, state: Any, moments: Any, *, damping: float | None = None
) -> tuple[Any, Any]:
  """Does what `opq_jax.encoders.Feedback(moments).choose_codes(params, state)` does."""
  from opq_jax.encoders import Feedback

  return tuple(Feedback(moments, **_given(damping=damping)).choose_codes(params, state))


def encode_with_trellis(
  params: Any, state: Any, moments: Any = None, *, damping: float | None = None
) -> tuple[Any, Any]:
  """Does what `opq_jax.encoders.Trellis(moments).choose_codes(params, state)` does."""
  from opq_jax.encoders import Trellis

  return tuple(Trellis(moments, **_given(damping=damping)).choose_codes(params, state))


def encode_layer_by_layer(
  apply_fn: Callable[..., Any],
  variables: Mapping[str, Any],
  state: Any,
  inputs: Any,
  *,
  share: float | None = None,
  damping: float | None = None,
  trellis: bool = False,
) -> tuple[Any, Any]:
  """Does what `LayerByLayer(apply_fn, inputs, first).choose_codes(variables, state)` does.

  The codes are chosen by `Trellis`, or by `Feedback`.  `state` holds plain grids.
  """
  from opq_jax.encoders import Feedback, LayerByLayer, Trellis

  first = Trellis() if trellis else Feedback({})  # its own moments serve allocation alone
  encoder = LayerByLayer(apply_fn, inputs, first, **_given(share=share, damping=damping))
  return tuple(encoder.choose_codes(variables, state))


def allocate_with_feedback(
  params: Any,
  moments: Any,
  *,
  compression_rate: float | None = None,
  bits_per_weight: float | None = None,
  damping: float | None = None,
  **options: Any,
) -> tuple[Any, Any, Any]:
  """Does what `opq_jax.compress(..., encoder=Feedback(moments))` does.

  Returns:
    (allocation, params, state).
  """
  from opq_jax.encoders import Feedback

  encoder = Feedback(moments, **_given(damping=damping))
  return _searched(encoder, params, compression_rate, bits_per_weight, options)


def allocate_with_trellis(
  params: Any,
  moments: Any = None,
  *,
  compression_rate: float | None = None,
  bits_per_weight: float | None = None,
  damping: float | None = None,
  **options: Any,
) -> tuple[Any, Any, Any]:
  """Does what `opq_jax.compress(..., encoder=Trellis(moments))` does.

  Returns:
    (allocation, params, state).
  """
  from opq_jax.encoders import Trellis

  encoder = Trellis(moments, **_given(damping=damping))
  return _searched(encoder, params, compression_rate, bits_per_weight, options)


def _given(**options: Any) -> dict[str, Any]:
  """The options that are not None: the others have the encoder's defaults."""
  return {name: value for name, value in options.items() if value is not None}


def _searched(
  encoder: Any,
  params: Any,
  compression_rate: float | None,
  bits_per_weight: float | None,
  options: dict[str, Any],
) -> tuple[Any, Any, Any]:
  from opq_jax.encoders import compress

  network = compress(
    params,
    compression_rate=compression_rate,
    bits_per_weight=bits_per_weight,
    encoder=encoder,
    **options,
  )
  return network.allocation, network.params, network.state


_FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
  'allocate_with_feedback': (allocate_with_feedback, _COMPRESS.format('Feedback(moments)')),
  'allocate_with_trellis': (allocate_with_trellis, _COMPRESS.format('Trellis(moments)')),
  'encode_layer_by_layer': (
    encode_layer_by_layer,
    _COMPRESS.format('LayerByLayer(fn, inputs, first)'),
  ),
  'encode_with_feedback': (encode_with_feedback, _CHOOSE.format('Feedback(moments)')),
  'encode_with_trellis': (encode_with_trellis, _CHOOSE.format('Trellis(moments)')),
}

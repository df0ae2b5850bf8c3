"""A record of how a file was made, to and from the texts of its metadata.

A file that `opq compress` wrote has these keys; `opq verify` repeats what they say.

    compression_rate, bits_per_weight, sparsity, bits, file_rate, palette_bits
                     targets, as numbers; beside file_rate the bits_per_weight that met it
    objective        of the allocation; divergence: what an error in a leaf costs the answer
    channel_axis     auto, first or last
    channel_axes     NAME=AXIS, one a line: of leaves whose axis a graph tells, or names do not
    slices           GLOB=N, one a line: the first N axes of leaves that GLOB matches count slices
    encoder          rounding, feedback, trellis or layer_by_layer
    first            of layer_by_layer: the encoder of each layer
    trellis_version  of codes along a trellis: version of the encoder, 1 where it is missing
    moments          of an encoder that reads moments: what they are from, synthetic images, images
                     or tokens
    inputs           of layer_by_layer: what the networks read, synthetic images, images or tokens
    images           number of images from a folder
    images_digest    of their files
    calibration      tokens that a language model reads: text, self (written by itself) or random
    calibration_tokens, calibration_digest
                     their number, and a digest of them
    batch_norm       noise, synthetic or images, from which it was corrected; or uncorrected
    inference_only   true, where BatchNorm is two vectors and vectors are rounded to bfloat16
    optimizer        means, where one number is in the places of each leaf of an optimizer's state:
                     the mean of second moments, 0 for others; or left_out, with zeros for all

Files up to version 0.1.0 have sentences in their place, which are still read.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from opq_jax.cli.globs import EXPRESSION, matches

PALETTE_BITS = 'palette_bits'
TARGETS = ('sparsity', 'bits', 'compression_rate', 'bits_per_weight', 'file_rate', PALETTE_BITS)
"""Keys of targets, named as the arguments of `opq_jax.compress`."""

SYNTHETIC, IMAGES, NOISE, UNCORRECTED = 'synthetic', 'images', 'noise', 'uncorrected'
TOKENS = 'tokens'
DIVERGENCE = 'divergence'
MEANS, LEFT_OUT = 'means', 'left_out'
FEEDBACK, TRELLIS, ROUNDING, LAYER_BY_LAYER = 'feedback', 'trellis', 'rounding', 'layer_by_layer'

MAX_IMAGES = 128
"""Images read from a folder by default: as many as synthetic ones of 224 pixels."""

MAX_TOKENS = 16384
"""Calibration tokens that are read by default, at most."""

_VERSION = 'opq_jax'  # the key with which the command line marks its files

_CHOICES = {
  'channel_axis': ('auto', 'first', 'last'),
  'encoder': (ROUNDING, FEEDBACK, TRELLIS, LAYER_BY_LAYER),
  'first': (ROUNDING, FEEDBACK, TRELLIS),
  'trellis_version': ('1', '2'),
  'moments': (SYNTHETIC, IMAGES, TOKENS),
  'inputs': (SYNTHETIC, IMAGES, TOKENS),
  'calibration': ('text', 'self', 'random'),
  'batch_norm': (NOISE, SYNTHETIC, IMAGES, UNCORRECTED),
  'optimizer': (MEANS, LEFT_OUT),
}
# key, value, and the other key that it needs.  Whatever is computed by running a network needs the
# name of that network
_NEEDS = (
  ('encoder', FEEDBACK, 'moments'),
  ('encoder', LAYER_BY_LAYER, 'first'),
  ('encoder', LAYER_BY_LAYER, 'inputs'),
  ('first', FEEDBACK, 'moments'),
  *((key, source, 'model') for key in ('moments', 'inputs') for source in (SYNTHETIC, IMAGES)),
  *(('batch_norm', source, 'model') for source in (NOISE, SYNTHETIC, IMAGES)),
  *((key, IMAGES, 'images') for key in ('moments', 'inputs', 'batch_norm')),
  ('inference_only', 'true', 'model'),
  *((key, TOKENS, 'calibration') for key in ('moments', 'inputs')),
  ('objective', DIVERGENCE, 'calibration'),
)


def lacks_optimizer(metadata: Mapping[str, str]) -> bool:
  """Returns whether a file with these metadata has one number for each leaf of an optimizer."""
  return metadata.get('optimizer') in _CHOICES['optimizer']


class ImageSet(NamedTuple):
  """Images from a folder: how many, and a digest of their files."""

  number: int
  digest: str


class TokenSet(NamedTuple):
  """Calibration tokens: of a text, written by the model itself, or random; number and digest."""

  source: str
  number: int
  digest: str


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How a file was made; the attributes are the keys of its metadata (see the module).

  Attributes:
    targets: by the names of `TARGETS`.
    objective: of the allocation.
    channel_axis: `auto`, `first` or `last`.
    channel_axes: axes of leaves whose graph tells them, by name.
    slices: globs of leaves, and how many of their leading axes count slices.
    encoder: name of the encoder.
    first: name of the encoder of each layer, for `layer_by_layer`.
    trellis_version: of the encoder along a trellis (`opq_jax.encoders.Trellis`).
    moments, inputs: where calibration images are from, or tokens; None where none are read.
    images: the images from a folder, None where there are none.
    tokens: the tokens that a language model reads, None where there are none.
    batch_norm: what BatchNorm was corrected from, None where there is no BatchNorm.
    inference_only: whether BatchNorm is two vectors, and vectors are rounded to bfloat16.
    optimizer: `means` or `left_out`, where an optimizer's state is not kept.

  >>> encoding = Encoding(targets={'compression_rate': 16.0}, encoder='trellis')
  >>> encoding.metadata()
  {'compression_rate': '16', 'channel_axis': 'auto', 'encoder': 'trellis'}
  >>> Encoding.of({**encoding.metadata(), 'opq_jax': '0.2.0'}) == encoding
  True
  """

  targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
  objective: str | None = None
  channel_axis: str = 'auto'
  channel_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  slices: Mapping[str, int] = dataclasses.field(default_factory=dict)
  encoder: str = ROUNDING
  first: str | None = None
  trellis_version: int | None = None
  moments: str | None = None
  inputs: str | None = None
  images: ImageSet | None = None
  tokens: TokenSet | None = None
  batch_norm: str | None = None
  inference_only: bool = False
  optimizer: str | None = None

  @property
  def reads_images(self) -> bool:
    """Whether an encoder or a correction reads images from a folder."""
    return IMAGES in (self.moments, self.inputs, self.batch_norm)

  def metadata(self) -> dict[str, str]:
    """Returns the keys of this record."""
    texts: dict[str, str | None] = {
      **{name: _number(value) for name, value in self.targets.items()},
      'objective': self.objective,
      'channel_axis': self.channel_axis,
      'channel_axes': '\n'.join(f'{name}={axis}' for name, axis in self.channel_axes.items())
      or None,
      'slices': '\n'.join(f'{glob}={n}' for glob, n in self.slices.items()) or None,
      'encoder': self.encoder,
      'first': self.first,
      'trellis_version': None if self.trellis_version is None else str(self.trellis_version),
      'moments': self.moments,
      'inputs': self.inputs,
      'images': None if self.images is None else str(self.images.number),
      'images_digest': None if self.images is None else self.images.digest,
      'calibration': None if self.tokens is None else self.tokens.source,
      'calibration_tokens': None if self.tokens is None else str(self.tokens.number),
      'calibration_digest': None if self.tokens is None else self.tokens.digest,
      'batch_norm': self.batch_norm,
      'inference_only': 'true' if self.inference_only else None,
      'optimizer': self.optimizer,
    }
    return {key: text for key, text in texts.items() if text is not None}

  @classmethod
  def of(cls, metadata: Mapping[str, str]) -> 'Encoding':
    """Parses the metadata of a file; those of a file that `opq compress` did not write say nothing.

    Raises:
      ValueError: a value is none of those that its key can have, or keys do not go together.
    """
    if _VERSION not in metadata:
      return cls(channel_axis=_axis_mode(metadata))
    texts = _without_sentences(metadata)
    for key, expected in _CHOICES.items():
      if key in texts and texts[key] not in expected:
        raise ValueError(
          f'metadata: {key}: found {texts[key]!r}, expected one of {", ".join(expected)}'
        )
    _check_together(texts)
    return cls(
      targets={
        name: _parsed(texts, name, int if name == PALETTE_BITS else _target)
        for name in TARGETS
        if name in texts
      },
      objective=texts.get('objective'),
      channel_axis=texts.get('channel_axis', 'auto'),
      channel_axes=_axes_in(texts),
      slices=_slices_in(texts),
      encoder=texts.get('encoder', ROUNDING),
      first=texts.get('first'),
      trellis_version=_parsed(texts, 'trellis_version', int)
      if 'trellis_version' in texts
      else None,
      moments=texts.get('moments'),
      inputs=texts.get('inputs'),
      images=ImageSet(_parsed(texts, 'images', int), texts.get('images_digest', ''))
      if 'images' in texts
      else None,
      tokens=TokenSet(
        texts['calibration'],
        _parsed(texts, 'calibration_tokens', int),
        texts.get('calibration_digest', ''),
      )
      if 'calibration' in texts
      else None,
      batch_norm=texts.get('batch_norm'),
      inference_only=texts.get('inference_only') == 'true',
      optimizer=texts.get('optimizer'),
    )


def _axes_in(texts: Mapping[str, str]) -> dict[str, int]:
  """Returns the names and axes of the metadata."""
  axes = {}
  for line in texts['channel_axes'].split('\n') if 'channel_axes' in texts else ():
    name, _, axis = line.rpartition('=')
    if not name or not re.fullmatch('[0-9]', axis):
      raise ValueError(f'metadata: channel_axes: found {line!r}, expected NAME=AXIS')
    axes[name] = int(axis)
  return axes


def _slices_in(texts: Mapping[str, str]) -> dict[str, int]:
  """Returns the globs and numbers of the metadata."""
  try:
    return dict(map(parsed_slices, texts['slices'].split('\n') if 'slices' in texts else ()))
  except ValueError as error:
    raise ValueError(f'metadata: {error}') from error


def _check_together(texts: Mapping[str, str]) -> None:
  """Raises ValueError where a key of the metadata is there without another that it needs."""
  for key, value, needed in _NEEDS:
    if texts.get(key) == value and needed not in texts:
      raise ValueError(f'metadata: found {key}={value} without {needed}, expected both')


def parsed_slices(text: str) -> tuple[str, int]:
  """Returns glob and number of GLOB=N.

  Raises:
    ValueError: the text is none.

  >>> parsed_slices('*/layers/*=1')
  ('*/layers/*', 1)
  """
  glob, _, number = text.rpartition('=')
  # a file's own metadata are read like this: no expression of a stranger is run
  if not glob or glob.startswith(EXPRESSION) or not re.fullmatch('[1-9]', number):
    raise ValueError(f'slices: found {text!r}, expected GLOB=N with N of 1 to 9')
  return glob, int(number)


def slices_of(slices: Mapping[str, int]) -> Callable[[str, Any], int]:
  """Returns (path, leaf) -> how many leading axes count slices: by the last glob that matches."""

  def count(path: str, _: Any) -> int:
    return next((n for glob, n in [*slices.items()][::-1] if matches(path, glob)), 0)

  return count


def channel_axis(
  metadata: Mapping[str, str], slices: Callable[[str, Any], int] | None = None
) -> Callable[[str, Any], int]:
  """Returns the function that gives the output-channel axis of a file's leaves.

  Args:
    metadata: of the file.
    slices: (path, leaf) -> how many leading axes of the leaf count slices.
  """
  import numpy as np

  from opq_jax.weights import channels

  mode: Any = _axis_mode(metadata)
  axes = _axes_in(metadata)

  def axis_of(path: str, leaf: Any) -> int:
    if path in axes:
      return axes[path]
    count = slices(path, leaf) if slices else 0
    # names tell the axis of one slice
    one = np.broadcast_to(0, np.shape(leaf)[count:])
    axis = channels.channel_axis(path, one, mode=mode)
    return axis + count if axis >= 0 else axis

  return axis_of


def _axis_mode(metadata: Mapping[str, str]) -> str:
  mode = metadata.get('channel_axis', 'auto')
  return mode if mode in _CHOICES['channel_axis'] else 'auto'


_FEEDBACK_CODES = {'encoder': FEEDBACK, 'moments': SYNTHETIC}
_SENTENCES: dict[str, dict[str, dict[str, str]]] = {
  'codes': {
    'by error feedback, moments from synthetic images': _FEEDBACK_CODES,
    'along a trellis': {'encoder': TRELLIS},
    'along a trellis, by error feedback, moments from synthetic images': {
      **_FEEDBACK_CODES,
      'encoder': TRELLIS,
    },
  },
  'batch_norm': {
    'corrected from noise': {'batch_norm': NOISE},
    'corrected from synthetic images': {'batch_norm': SYNTHETIC},
    'not corrected': {'batch_norm': UNCORRECTED},
  },
  'inference_only': {
    'BatchNorm in two vectors, vectors rounded to bfloat16': {'inference_only': 'true'},
  },
}
"""The sentences of files up to version 0.1.0, and the keys that say the same."""


def _without_sentences(metadata: Mapping[str, str]) -> dict[str, str]:
  """Returns metadata with the keys of today in the place of old sentences."""
  texts = dict(metadata)
  for key, sentences in _SENTENCES.items():
    if texts.get(key) in sentences:
      texts |= sentences[texts[key]]
  pairs = (part.partition('=') for part in texts.pop('targets', '').split())
  return texts | {name: value for name, _, value in pairs if name in TARGETS}


def _parsed(texts: Mapping[str, str], key: str, kind: Callable[[str], Any]) -> Any:
  try:
    return kind(texts[key])
  except ValueError as error:
    raise ValueError(
      f'metadata: {key}: found {texts[key]!r}, expected a finite number, none below 0'
    ) from error


def _target(text: str) -> float:
  if not 0 <= (number := float(text)) < math.inf:
    raise ValueError(f'found {text!r}')
  return number


def _number(value: float) -> str:
  """Returns the shortest text that parses back to the same float."""
  short = f'{value:g}'
  return short if float(short) == value else repr(value)

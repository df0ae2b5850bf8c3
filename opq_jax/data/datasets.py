"""Batches of images from TensorFlow Datasets, without TensorFlow.

A dataset that TFDS prepared as array_record files is read at random by `tfds.data_source`; grain's
`DataLoader` shards, shuffles, prepares and batches it.  Preparing one once, on a machine that has
TensorFlow: `tfds build cifar10 --file_format=array_record --data_dir=…`.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from jaxtyping import Float32, UInt8
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """From an image's bytes to a network's input, the same way every time: for evaluation.

      output = (crop(resize(image)) / 255 - mean) / std

  Attributes:
    mean: of each colour channel, in units where white is 1.
    std: likewise; positive.
    resize: the shorter side in pixels after resizing, None for no resizing.  The longer side
      keeps its proportion.  An image that has this size already is left untouched.
    crop: the side in pixels of the square cut out of the middle, None for no cropping.
    resample: PIL's filter for resizing, which widens when it shrinks an image.

  >>> image = np.full((256, 320, 3), 255, np.uint8)
  >>> prepared = TF_SLIM(image)
  >>> prepared.shape, prepared.dtype, float(prepared.max())
  ((224, 224, 3), dtype('float32'), 1.0)
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  resize: int | None = None
  crop: int | None = None
  resample: Literal['bilinear', 'bicubic'] = 'bilinear'

  def __call__(self, image: UInt8[np.ndarray, 'height width 3']) -> Float32[np.ndarray, '...']:
    """The prepared image, [crop, crop, 3] if there is a crop.

    Raises:
      ValueError: not an 8-bit colour image, or one smaller than the crop.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      raise ValueError(
        f'image: found {image.dtype} of shape {image.shape}, expected uint8 [height, width, 3]'
      )
    if self.resize is not None:
      image = _resize(image, self.resize, Image.Resampling[self.resample.upper()])
    if self.crop is not None:
      image = _centre(image, self.crop)
    # one subtraction and one division, so that 127.5 and 127.5 give exactly x / 127.5 - 1
    mean, std = (255 * np.asarray(values) for values in (self.mean, self.std))
    return (image - mean.astype(np.float32)) / std.astype(np.float32)


TF_SLIM = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=256, crop=224)
"""ImageNet as TF-slim's MobileNets want it: x / 127.5 - 1 at 224 pixels."""

TORCHVISION = Preprocessing(
  mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256, crop=224
)
"""ImageNet as torchvision's networks want it: standardised by ImageNet's statistics."""

CAFFE = Preprocessing(
  mean=(123.68 / 255, 116.779 / 255, 103.939 / 255), std=(1 / 255,) * 3, resize=256, crop=224
)
"""ImageNet as Keras' ResNet50 and VGG16 want it: less the mean, in units of bytes; red first."""

CIFAR = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""CIFAR at its 32 pixels, standardised by ImageNet's statistics as many published ResNets are."""


def source(name: str, split: Any, data_dir: str | os.PathLike[str]) -> Sequence[dict[str, Any]]:
  """The examples of one split, decoded one at a time where they are asked for.

  Args:
    name: the dataset, `'imagenet2012'`, or with its version, `'cifar10:3.0.2'`.
    split: `'train'`, `'train[:10%]'`, `'train+validation'` and so on, as TFDS understands it.
    data_dir: the folder that holds `<name>/<version>/`.

  Returns:
    A sequence of dicts; `len` is the number of examples.  Nothing is ever downloaded.

  Raises:
    ValueError: the folder lacks the dataset, has it in a format that needs TensorFlow, or the
      dataset lacks the split.
  """
  folder = os.path.expanduser(os.fspath(data_dir))
  expected = f'expected {name} there, prepared by TFDS with file_format=array_record'
  try:
    builder = tfds.builder(name, data_dir=folder)
  # what TFDS says here is a list of every dataset that it knows
  except tfds.core.DatasetNotFoundError as error:
    raise ValueError(f'data_dir: found no {name} in {folder!r}, {expected}') from error
  if not builder.info.splits:
    raise ValueError(f'data_dir: found no {name} in {folder!r}, {expected}')
  try:
    return builder.as_data_source(split=split)
  except NotImplementedError as error:
    found = builder.info.file_format
    raise ValueError(
      f'data_dir: found {name} in {folder!r} as {found and found.value} files, {expected}'
    ) from error
  except ValueError as error:
    raise ValueError(
      f'split: found {split!r}, expected one made of {sorted(builder.info.splits)} ({error})'
    ) from error


def batches(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str],
  batch_size: int,
  preprocessing: Preprocessing,
  shuffle: bool = False,
  seed: int = 0,
  epochs: int | None = 1,
  drop_remainder: bool = False,
  worker_count: int = 0,
  shard: tuple[int, int] | None = None,
) -> grain.DataLoader:
  """Batches of prepared images: this process's share of them.

  As it stands by default, made for evaluation: every example exactly once over all processes, in
  the dataset's order, the last batch smaller if need be.  (Shards differ by at most one example,
  so that one process may have a batch more than another.)

  Args:
    name: the dataset; see `source`.
    split: the split; see `source`.
    data_dir: the folder that holds it.
    batch_size: examples in a batch of all processes together.
    preprocessing: what turns an image into an input.
    shuffle: a new order in every epoch, determined by `seed`; each process stays in its own shard.
    seed: of everything random.
    epochs: passes over the data, None for no end.  Batches run on from one epoch into the next.
    drop_remainder: all batches have the same size and all processes equally many: for training.
      At most the last, incomplete batch of each process and the examples that do not divide
      among the processes are left out.
    worker_count: 0 works in this process: threads decode the images, and the thread that iterates
      prepares them.  n > 0 starts n processes, each of which makes every n-th batch: quicker
      where preparing is the bottleneck, but they take seconds to start, the order of the examples
      depends on n, and each ends with an incomplete batch of its own (kept, or dropped with
      `drop_remainder`), which may come before the last one.  They copy this program's absl flags,
      which must have been parsed: `absl.app.run` does that.
    shard: (index, count) of this share; by default this JAX process among all.

  Returns:
    An iterable of dicts, `{'image': float32 [batch, height, width, 3], 'label': int32 [batch]}`.
    Each `iter()` starts anew, and yields the same; its `get_state` and `set_state` are grain's.

  Raises:
    ValueError: see `source`; or the batch size is not a positive multiple of the number of shards;
      or there are workers to start and absl's flags are not parsed.
  """
  index, count = (jax.process_index(), jax.process_count()) if shard is None else shard
  if batch_size <= 0 or batch_size % count:
    raise ValueError(
      f'batch_size: found {batch_size}, expected a positive multiple of the {count} processes'
    )
  if worker_count > 0 and not flags.FLAGS.is_parsed():
    raise ValueError(
      f"worker_count: found {worker_count} and absl's flags not parsed, expected 0 or a program "
      'that was started by absl.app.run'
    )
  # sharded here and not by grain, whose DataLoader rounds the length of a shard down (0.2.18)
  share = tfds.even_splits(split, count, drop_remainder=drop_remainder)[index]
  examples = source(name, share if count > 1 else split, data_dir)
  sampler = grain.samplers.IndexSampler(
    num_records=len(examples),
    shard_options=grain.sharding.NoSharding(),
    shuffle=shuffle,
    num_epochs=epochs,
    # shards of equal seeds would draw equal numbers for their examples
    seed=int(np.random.SeedSequence((seed, index)).generate_state(1)[0]),
  )
  return grain.DataLoader(
    data_source=examples,
    sampler=sampler,
    operations=[
      _Prepare(preprocessing),
      grain.transforms.Batch(batch_size // count, drop_remainder=drop_remainder),
    ],
    worker_count=worker_count,
  )


@dataclasses.dataclass(frozen=True)
class _Prepare(grain.transforms.Map):
  """A decoded TFDS example -> what a training or evaluation step reads."""

  preprocessing: Preprocessing

  def map(self, element: dict[str, Any]) -> dict[str, np.ndarray | np.int32]:
    return {
      'image': self.preprocessing(element['image']),
      'label': np.int32(element['label']),
    }


def _resize(
  image: UInt8[np.ndarray, 'height width 3'], shorter: int, resample: Image.Resampling
) -> UInt8[np.ndarray, 'rows columns 3']:
  height, width = image.shape[:2]
  if min(height, width) == shorter:
    return image
  rows, columns = (int(shorter * side / min(height, width)) for side in (height, width))
  resized = Image.fromarray(image).resize((columns, rows), resample)
  return np.asarray(resized)


def _centre(
  image: UInt8[np.ndarray, 'height width 3'], side: int
) -> UInt8[np.ndarray, 'side side 3']:
  height, width = image.shape[:2]
  if min(height, width) < side:
    raise ValueError(
      f'image: found {height} x {width} pixels, expected at least the crop of {side} x {side}'
    )
  top, left = round((height - side) / 2), round((width - side) / 2)
  return image[top : top + side, left : left + side]

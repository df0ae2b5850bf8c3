"""Unlabelled calibration images from a folder."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from opq_jax.cli.encoding import ImageSet
from opq_jax.core.extras import require

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
"""Suffixes of files that are read, in upper or lower case; other files are ignored."""


class FolderImages(NamedTuple):
  """Prepared images of a folder.

  Attributes:
    batches: [batch, height, width, 3] each, all of one size.
    images: their number, and the digest of their files.
    total: number of image files in the folder.
  """

  batches: list[Float32[np.ndarray, 'batch height width 3']]
  images: ImageSet
  total: int


def read_images(
  folder: str | os.PathLike[str],
  preprocessing: Callable[[Any], Any],
  *,
  side: int,
  batch_size: int,
  max_images: int,
) -> FolderImages:
  """Reads and prepares images, always the same ones in the same order.

  The files of the folder and of its subfolders are sorted by their path.  Where there are more than
  `max_images`, they are taken at equal distances, so that every subfolder (a class, say) has its
  share.

  Args:
    folder: the folder.
    preprocessing: of the network, from uint8 [height, width, 3].
    side: height and width of a prepared image, in pixels.
    batch_size: images in a batch, about: batches are made equal, and fewer than one batch's number
      of images are left out for it.
    max_images: the largest number to read.

  Raises:
    ValueError: there are no images, one cannot be read, one has another size after preprocessing,
      or Pillow is not installed.
  """
  if max_images < 1:
    raise ValueError(f'number of images: found {max_images}, expected 1 or more')
  pillow = require('PIL.Image', 'data', os.fspath(folder))
  root = Path(folder)
  if not root.is_dir():
    raise ValueError(f'{folder}: found no folder, expected one of images')
  names = sorted(
    path.relative_to(root).as_posix()
    for path in root.rglob('*')
    if path.suffix.lower() in SUFFIXES and not path.name.startswith('.') and path.is_file()
  )
  if not names:
    raise ValueError(f'{folder}: found no images, expected files of {", ".join(SUFFIXES)}')
  number = min(len(names), max_images)
  count = max(number // batch_size, 1)
  number -= number % count
  digest = hashlib.sha256()
  prepared = []
  for name in (names[i * len(names) // number] for i in range(number)):
    path = root / name
    digest.update(hashlib.sha256(path.read_bytes()).digest())
    try:
      with pillow.open(path) as image:
        pixels = np.asarray(image.convert('RGB'))
      prepared.append(preprocessing(pixels))
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
      raise ValueError(f'{path}: found no image that can be prepared: {error}') from error
    if prepared[-1].shape != (side, side, 3):
      height, width, _ = prepared[-1].shape
      raise ValueError(
        f'{path}: found an image of {width} x {height} pixels, expected {side} x {side}'
      )
  batches = np.split(np.stack(prepared), count)
  return FolderImages(batches, ImageSet(number, digest.hexdigest()[:16]), len(names))

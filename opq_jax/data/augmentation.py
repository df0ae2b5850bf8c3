"""Augmented views of training images, determined by uniform numbers from the caller.

An augmentation is a function (image, uniforms) -> image of 8-bit images.  It draws no random
numbers of its own: the uniform numbers determine the view, so that the view of an example does not
depend on the process or thread that prepares it.
"""

import dataclasses
import math
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from opq_jax.core.extras import require

UNIFORMS = 32
"""Uniform numbers in [0, 1) that an augmentation may use for one example."""

# windows drawn by RandomResizedCrop: two numbers each, beside three for its place and the flip
_ATTEMPTS = (UNIFORMS - 3) // 2

Pixels = UInt8[np.ndarray, 'height width channels']


class Augmentation(Protocol):
  """Returns a view of an image, determined by `UNIFORMS` numbers in [0, 1)."""

  def __call__(self, image: Pixels, uniforms: Float[np.ndarray, ' numbers']) -> Pixels: ...


@dataclasses.dataclass(frozen=True)
class PadCropFlip:
  """CIFAR's standard: a random crop of the padded image, and a random horizontal flip.

  He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with zeros.
  Black borders move the mean and the variance of all activations away from those of whole images;
  reflected pixels do not.

  Attributes:
    padding: pixels added on every side.
    flip: True to mirror half of the views.
    mode: 'constant' adds zeros; 'reflect' mirrors the image at its edges (`numpy.pad`).

  >>> image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
  >>> PadCropFlip(padding=1)(image, np.array([0.0, 0.5, 0.9]))[:, :, 0].tolist()
  [[0, 0, 0, 0], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
  """

  padding: int = 4
  flip: bool = True
  mode: Literal['constant', 'reflect'] = 'constant'

  def __call__(self, image: Pixels, uniforms: Float[np.ndarray, ' numbers']) -> Pixels:
    height, width = image.shape[:2]
    # zeros before preprocessing, as in most published code for CIFAR in 8 bits
    sides = (self.padding, self.padding)
    padded = np.pad(image, (sides, sides, (0, 0)), self.mode)
    top, left = (int(u * (2 * self.padding + 1)) for u in uniforms[:2])
    view = padded[top : top + height, left : left + width]
    return view[:, ::-1] if self.flip and uniforms[2] < 0.5 else view


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """ImageNet's standard: a window of random area and aspect ratio, resized to a square, flipped.

  The window has the share a ~ U(area) of the image's area and the aspect ratio r, log r ~
  U(log ratio).  The first of 14 draws that fits into the image is placed at random.  If none fits,
  the window is the largest central one with an allowed aspect ratio.  Szegedy et al., "Going Deeper
  with Convolutions", CVPR 2015, in the form of torchvision's `RandomResizedCrop`, which draws 10.

  Attributes:
    size: side of the view in pixels.
    area: range of the window's share of the image.
    ratio: range of the aspect ratio, width over height.
    flip: True to mirror half of the views.

  >>> crop = RandomResizedCrop(size=8)
  >>> crop(np.zeros((30, 40, 3), np.uint8), np.full(UNIFORMS, 0.5)).shape
  (8, 8, 3)
  >>> crop.window(30, 40, np.full(UNIFORMS, 0.5))  # .54 of the area, square, in the middle
  (8, 3, 25, 25)
  """

  size: int = 224
  area: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = True

  def __call__(self, image: Pixels, uniforms: Float[np.ndarray, ' numbers']) -> Pixels:
    left, top, width, height = self.window(image.shape[0], image.shape[1], uniforms)
    pillow = require('PIL.Image', 'data', 'resizing an image')
    view = pillow.fromarray(image).resize(
      (self.size, self.size),
      pillow.Resampling.BILINEAR,
      box=(left, top, left + width, top + height),
    )
    pixels = np.asarray(view)
    return pixels[:, ::-1] if self.flip and uniforms[2] < 0.5 else pixels

  def window(
    self, height: int, width: int, uniforms: Float[np.ndarray, ' numbers']
  ) -> tuple[int, int, int, int]:
    """Returns (left, top, width, height) of the window, in pixels of an image of this size."""
    low, high = (math.log(bound) for bound in self.ratio)
    for u, v in uniforms[3 : 3 + 2 * _ATTEMPTS].reshape(-1, 2):
      area = height * width * (self.area[0] + u * (self.area[1] - self.area[0]))
      ratio = math.exp(low + v * (high - low))
      columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if 0 < columns <= width and 0 < rows <= height:
        top, left = (
          int(uniforms[i] * (room + 1)) for i, room in enumerate((height - rows, width - columns))
        )
        return left, top, columns, rows
    columns = min(width, round(height * self.ratio[1]))
    rows = min(height, round(width / self.ratio[0]))
    return (width - columns) // 2, (height - rows) // 2, columns, rows

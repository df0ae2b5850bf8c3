"""Random views of training images, decided by numbers that are handed in.

An augmentation is a function (image, uniforms) -> image of 8-bit images.  It draws nothing: the
uniform numbers say which view, so that an example's view does not depend on who prepares it.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

UNIFORMS = 32  # numbers in [0, 1) for every example
_ATTEMPTS = (UNIFORMS - 3) // 2

Pixels = UInt8[np.ndarray, 'height width channels']


class Augmentation(Protocol):
  """Makes a view of an image from `UNIFORMS` numbers in [0, 1)."""

  def __call__(self, image: Pixels, uniforms: Float[np.ndarray, ' numbers']) -> Pixels: ...


@dataclasses.dataclass(frozen=True)
class PadCropFlip:
  """CIFAR's standard: zeros around the image, a random window of its own size, a random flip.

  He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

  Attributes:
    padding: pixels on every side.
    flip: whether half of the views are mirrored.

  >>> image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
  >>> PadCropFlip(padding=1)(image, np.array([0.0, 0.5, 0.9]))[:, :, 0].tolist()
  [[0, 0, 0, 0], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
  """

  padding: int = 4
  flip: bool = True

  def __call__(self, image: Pixels, uniforms: Float[np.ndarray, ' numbers']) -> Pixels:
    height, width = image.shape[:2]
    # zeros before preprocessing, as in most published code for CIFAR in 8 bits
    padded = np.zeros(
      (height + 2 * self.padding, width + 2 * self.padding, image.shape[2]), np.uint8
    )
    padded[self.padding : self.padding + height, self.padding : self.padding + width] = image
    top, left = (int(u * (2 * self.padding + 1)) for u in uniforms[:2])
    view = padded[top : top + height, left : left + width]
    return view[:, ::-1] if self.flip and uniforms[2] < 0.5 else view


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """ImageNet's standard: a window of random area and proportion, resized to a square, flipped.

  Area a ~ U(area) of the image's and proportion r, log r ~ U(log ratio): the first of 14 such
  windows that fits is placed at random; if none does, the largest window in the middle whose
  proportion is allowed.  Szegedy et al., "Going Deeper with Convolutions", CVPR 2015; the form is
  torchvision's `RandomResizedCrop`, which tries 10.

  Attributes:
    size: side of the view in pixels.
    area: range of the window's share of the image.
    ratio: range of width over height.
    flip: whether half of the views are mirrored.
  """

  size: int = 224
  area: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = True

  def __call__(self, image: Pixels, uniforms: Float[np.ndarray, ' numbers']) -> Pixels:
    left, top, width, height = self.window(image.shape[0], image.shape[1], uniforms)
    view = Image.fromarray(image).resize(
      (self.size, self.size),
      Image.Resampling.BILINEAR,
      box=(left, top, left + width, top + height),
    )
    pixels = np.asarray(view)
    return pixels[:, ::-1] if self.flip and uniforms[2] < 0.5 else pixels

  def window(
    self, height: int, width: int, uniforms: Float[np.ndarray, ' numbers']
  ) -> tuple[int, int, int, int]:
    """Left, top, width and height of the window in an image of this size."""
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

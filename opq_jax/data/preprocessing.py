"""From an image's bytes to a network's input, deterministically: for evaluation and calibration."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8

from opq_jax.core.extras import require


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Resizes, crops and standardises an image:

      output = (crop(resize(image)) / 255 - mean) / std

  Attributes:
    mean: of each colour channel, in units in which white is 1.
    std: of each colour channel, in the same units; positive.
    resize: length of the shorter side after resizing, in pixels; None for no resizing.  The aspect
      ratio is kept.  An image whose shorter side has this length already is left untouched.
    crop: side of the square cut out of the centre, in pixels; None for no cropping.
    resample: filter of Pillow's resizing, whose support grows when an image shrinks.

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
    """Returns the network's input, [crop, crop, 3] where `crop` is set.

    Raises:
      ValueError: the image is no 8-bit colour image, or is smaller than the crop.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      raise ValueError(
        f'image: found {image.dtype} of shape {image.shape}, expected uint8 [height, width, 3]'
      )
    if self.resize is not None:
      image = _resize(image, self.resize, self.resample)
    if self.crop is not None:
      image = _centre(image, self.crop)
    # one subtraction and one division, so that 127.5 and 127.5 give exactly x / 127.5 - 1
    mean, std = (255 * np.asarray(values) for values in (self.mean, self.std))
    return (image - mean.astype(np.float32)) / std.astype(np.float32)


TF_SLIM = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=256, crop=224)
"""ImageNet for TF-slim's MobileNets: x / 127.5 - 1 at 224 pixels."""

TORCHVISION = Preprocessing(
  mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256, crop=224
)
"""ImageNet for torchvision's networks: standardised by ImageNet's statistics, at 224 pixels."""

CAFFE = Preprocessing(
  mean=(123.68 / 255, 116.779 / 255, 103.939 / 255), std=(1 / 255,) * 3, resize=256, crop=224
)
"""ImageNet for Keras' ResNet50 and VGG16: ImageNet's mean subtracted, in units of bytes, RGB."""

CIFAR = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""CIFAR at its 32 pixels, standardised by ImageNet's statistics as many published ResNets are."""


def _resize(
  image: UInt8[np.ndarray, 'height width 3'], shorter: int, resample: str
) -> UInt8[np.ndarray, 'rows columns 3']:
  height, width = image.shape[:2]
  if min(height, width) == shorter:
    return image
  pillow = require('PIL.Image', 'data', 'resizing an image')
  rows, columns = (int(shorter * side / min(height, width)) for side in (height, width))
  resized = pillow.fromarray(image).resize((columns, rows), pillow.Resampling[resample.upper()])
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

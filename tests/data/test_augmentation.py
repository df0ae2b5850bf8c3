"""Augmented views of images from given uniform numbers."""

import numpy as np
import pytest

from opq_jax.data import UNIFORMS, PadCropFlip, RandomResizedCrop

IMAGE = np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8)


def uniforms(*first):
  return np.array([*first, *[0.5] * (UNIFORMS - len(first))])


def test_pad_crop_flip_centre_is_the_image():
  np.testing.assert_array_equal(PadCropFlip()(IMAGE, uniforms(0.5, 0.5, 0.5)), IMAGE)
  np.testing.assert_array_equal(PadCropFlip()(IMAGE, uniforms(0.5, 0.5, 0.49)), IMAGE[:, ::-1])


def test_pad_crop_flip_reaches_corners():
  view = PadCropFlip()(IMAGE, uniforms(0.0, 0.999, 0.9))
  np.testing.assert_array_equal(view[4:, :28], IMAGE[:28, 4:])
  assert (view[:4] == 0).all() and (view[:, 28:] == 0).all()


def test_pad_crop_flip_reflects_without_repeating_the_edge():
  view = PadCropFlip(mode='reflect')(IMAGE, uniforms(0.0, 0.999, 0.9))
  np.testing.assert_array_equal(view[4:, :28], IMAGE[:28, 4:])
  np.testing.assert_array_equal(view[:4, :28], IMAGE[4:0:-1, 4:])
  np.testing.assert_array_equal(view[4:, 28:], IMAGE[:28, 30:26:-1])


def test_pad_crop_flip_is_uniform():
  rng = np.random.default_rng(1)
  column = np.arange(1, 33, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
  found = [PadCropFlip(flip=False)(column, rng.random(UNIFORMS))[16, 16, 0] for _ in range(1800)]
  values, counts = np.unique(found, return_counts=True)
  np.testing.assert_array_equal(values, np.arange(13, 22))
  assert counts.min() > 150 and counts.max() < 250


@pytest.mark.parametrize('shape', [(256, 341), (500, 256), (60, 900)])
def test_random_resized_crop_windows(shape):
  rng = np.random.default_rng(2)
  crop, pixels = RandomResizedCrop(), shape[0] * shape[1]
  areas = []
  for _ in range(500):
    left, top, width, height = crop.window(*shape, rng.random(UNIFORMS))
    assert 0 <= left <= shape[1] - width and 0 <= top <= shape[0] - height
    assert 0.74 < width / height < 1.35
    areas.append(width * height / pixels)
  if shape != (60, 900):
    assert min(areas) >= 0.079 and 0.25 < np.mean(areas) < 0.6


def test_random_resized_crop_falls_back():
  always_whole = np.full(UNIFORMS, 0.999)
  assert RandomResizedCrop().window(60, 900, always_whole) == (410, 0, 80, 60)
  always_whole[4::2] = 0.0  # as tall as may be
  assert RandomResizedCrop().window(900, 60, always_whole) == (0, 410, 60, 80)


def test_random_resized_crop_view():
  image = np.zeros((300, 300, 3), np.uint8)
  image[:, :150] = 200
  crop = RandomResizedCrop(size=64, area=(1.0, 1.0), ratio=(1.0, 1.0))
  view = crop(image, uniforms(0.0, 0.0, 0.9))
  assert view.shape == (64, 64, 3) and view.dtype == np.uint8
  assert (view[:, :30] == 200).all() and (view[:, 34:] == 0).all()
  np.testing.assert_array_equal(crop(image, uniforms(0.0, 0.0, 0.1)), view[:, ::-1])

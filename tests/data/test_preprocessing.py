"""Preprocessing of images against numpy and Pillow."""

import numpy as np
import pytest
from PIL import Image

from opq_jax import data

PLAIN = data.Preprocessing(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


def test_tf_slim_range_is_exact():
  image = np.arange(256, dtype=np.uint8).repeat(256 * 3).reshape(256, 256, 3)
  prepared = data.TF_SLIM(image)
  assert prepared.shape == (224, 224, 3)
  expected = np.arange(16, 240, dtype=np.float32) / np.float32(127.5) - np.float32(1)
  np.testing.assert_allclose(prepared[:, 0, 0], expected, rtol=0, atol=1e-7)
  ends = np.array([0, 255], np.uint8).repeat(3).reshape(1, 2, 3)
  whole = data.Preprocessing(mean=data.TF_SLIM.mean, std=data.TF_SLIM.std)
  np.testing.assert_array_equal(whole(ends)[0, :, 0], [-1, 1])


def test_cifar_standardises_channels():
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(data.CIFAR(image), expected, rtol=1e-5, atol=1e-6)


def test_crop_is_central_and_exact():
  image = np.random.default_rng(0).integers(0, 256, (256, 341, 3), np.uint8)
  cut = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, resize=256, crop=224)(image)
  np.testing.assert_allclose(cut, image[16:240, 58:282], atol=1e-4)


@pytest.mark.parametrize('shape', [(512, 640), (640, 512)])
def test_resize_averages_when_shrinking(shape):
  # a fine checkerboard: picking single pixels would give black or white, an average gives grey
  board = (np.indices(shape).sum(0) % 2 * 255).astype(np.uint8)
  resize = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, resize=256)
  small = resize(np.repeat(board[:, :, None], 3, axis=2))
  assert small.shape == (shape[0] // 2, shape[1] // 2, 3)
  assert np.abs(small[2:-2, 2:-2] - 127.5).max() < 2


@pytest.mark.parametrize('resample', ['bilinear', 'bicubic'])
def test_resize_equals_pillow(resample):
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  resize = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, resize=30, resample=resample)
  expected = Image.fromarray(image).resize((45, 30), Image.Resampling[resample.upper()])
  np.testing.assert_allclose(resize(image), np.asarray(expected), atol=1e-4)


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    (
      np.zeros((300, 300, 3), np.float32),
      r'found float32 of shape \(300, 300, 3\), expected uint8',
    ),
    (np.zeros((300, 300, 1), np.uint8), r'found uint8 of shape \(300, 300, 1\), expected uint8'),
  ],
)
def test_preprocessing_needs_colour_images(image, message):
  with pytest.raises(ValueError, match=message):
    data.TORCHVISION(image)


def test_crop_needs_a_large_image():
  crop = data.Preprocessing(mean=PLAIN.mean, std=PLAIN.std, crop=224)
  with pytest.raises(ValueError, match='found 32 x 300 pixels, expected at least the crop of 224'):
    crop(np.zeros((32, 300, 3), np.uint8))

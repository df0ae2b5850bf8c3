"""Calibration images are the same ones in the same order."""

import sys

import numpy as np
import pytest

from opq_jax.cli.images import read_images

Image = pytest.importorskip('PIL.Image')
SIDE = 4


def identity(pixels):
  return pixels.astype(np.float32)


@pytest.fixture
def folder(tmp_path):
  """Ten images of one colour each, their number, in two subfolders, and files of other kinds."""
  for number in range(10):
    place = tmp_path / 'images' / ('first' if number < 5 else 'second')
    place.mkdir(parents=True, exist_ok=True)
    pixels = np.full((SIDE, SIDE, 3), number, np.uint8)
    Image.fromarray(pixels).save(place / f'{number}.{"png" if number % 2 else "BMP"}')
  (tmp_path / 'images' / 'notes.txt').write_text('no image')
  (tmp_path / 'images' / '.hidden.png').write_text('no image')
  return tmp_path / 'images'


def read(folder, batch_size=4, max_images=100, preprocessing=identity):
  return read_images(folder, preprocessing, side=SIDE, batch_size=batch_size, max_images=max_images)


def colours(images):
  return [[int(image[0, 0, 0]) for image in batch] for batch in images.batches]


@pytest.mark.parametrize(
  ('batch_size', 'max_images', 'expected'),
  [
    (100, 100, [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]),
    (4, 100, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
    (3, 100, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
    (100, 5, [[0, 2, 4, 6, 8]]),
    (1, 1, [[0]]),
  ],
)
def test_read_images_makes_equal_batches(folder, batch_size, max_images, expected):
  images = read(folder, batch_size, max_images)
  assert colours(images) == expected
  assert images.images.number == sum(map(len, expected)) and images.total == 10
  again = read(folder, batch_size, images.images.number)
  assert again.images == images.images


def test_read_images_knows_other_files(folder):
  digest = read(folder).images.digest
  Image.fromarray(np.full((SIDE, SIDE, 3), 77, np.uint8)).save(folder / 'first' / '3.png')
  assert read(folder).images.digest != digest


def test_read_images_refuses_unusable_folders(folder, tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='missing: found no folder, expected one of images'):
    read(tmp_path / 'missing')
  with pytest.raises(ValueError, match=r'empty: found no images, expected files of \.bmp'):
    read(tmp_path / 'empty')
  with pytest.raises(ValueError, match='number of images: found 0, expected 1 or more'):
    read(folder, max_images=0)
  half = lambda pixels: identity(pixels)[:2]
  with pytest.raises(ValueError, match=r'0\.BMP: found an image of 4 x 2 pixels, expected 4 x 4'):
    read(folder, preprocessing=half)
  (folder / 'first' / '0.BMP').write_text('no image')
  with pytest.raises(ValueError, match=r'0\.BMP: found no image that can be prepared'):
    read(folder)


def test_read_images_names_the_extra(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'PIL.Image', None)
  with pytest.raises(ValueError, match=r'images: needs PIL, .*pip install opq_jax\[data\]'):
    read(folder)

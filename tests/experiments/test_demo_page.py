"""The demonstration page: a file decoded in a browser, and run on photographs."""

import json
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest

import opq_jax
from opq_jax import data
from opq_jax.compression import CompressionState
from opq_jax.data.preprocessing import Preprocessing
from opq_jax.importers import networks
from tests.helpers import assets, chromium, demo_pages, opq_files

pytestmark = pytest.mark.slow

image_files = pytest.importorskip('PIL.Image', reason='found no pillow, expected it for pictures')
DEMO = pathlib.Path(__file__).parents[2] / 'experiments' / 'demo_page'
RUNTIME = 'onnxruntime-web', '1.30.0'
PHOTOGRAPHS = 20


@pytest.fixture(scope='module')
def network_file(tmp_path_factory):
  """Real weights, pointwise kernels on grids of 101 to 201 values: quick to make, nearly floats."""
  weights = assets.real_weights('mobilenet_v1')
  network = networks.load(weights, name='mobilenet_v1', num_classes=1000)

  def record(leaf):
    if np.ndim(leaf) < 2 or leaf.shape[-2] == 1:
      return None
    step = 2.0 ** np.ceil(np.log2(np.abs(leaf).max() / 100))  # products with levels are exact
    return opq_files.leaf_state(np.asarray(leaf), threshold=step / 2, step=step, levels=100)

  state = CompressionState(jax.tree.map(record, network.variables))
  path = tmp_path_factory.mktemp('opq') / 'net.opq'
  metadata = networks.metadata(network)
  opq_jax.save(path, network.variables, state, metadata=metadata, contexts=False)
  return path


@pytest.fixture(scope='module')
def page_folder(network_file, tmp_path_factory):
  pytest.importorskip('jax2onnx', reason='found no jax2onnx, expected it to convert the network')
  from experiments.demo_page import make

  folder = tmp_path_factory.mktemp('demo') / 'page'
  classes = folder.parent / 'classes.txt'
  classes.write_text('\n'.join(f'<b>{number}</b>' for number in range(1000)))
  make.write(network_file, assets.npm_package(*RUNTIME), folder, classes)
  return folder


@chromium.needs_chromium
def test_photographs_as_in_jax(page_folder, network_file, tmp_path):
  """The pixels of the page are those of JAX, logits differ in the last bits, and classes agree."""
  network = networks.load(network_file)
  forward = jax.jit(network.model.apply)
  examples = data.source('imagenet2012', 'validation', assets.assets() / 'tfds')
  rights = 0
  with demo_pages.opened(page_folder, tmp_path / 'profile') as page:
    for number in range(PHOTOGRAPHS):
      example = examples[number]
      # not JPEG, whose decoders differ
      path = tmp_path / f'{number}.png'
      image_files.fromarray(example['image']).save(path)
      # every second one is dropped on the page
      logits, pixels = demo_pages.answer(page, path, page.drop if number % 2 else None)
      images = network.source.preprocessing(example['image'])[None]
      np.testing.assert_array_equal(pixels, np.rint(images[0] * 127.5 + 127.5))
      expected = np.asarray(forward(network.variables, images))[0]
      np.testing.assert_allclose(logits, expected, atol=4e-5)
      assert logits.argmax() == expected.argmax()
      # names of classes are texts
      names = 'document.querySelector("#classes th").textContent'
      assert page.value(names) == f'<b>{expected.argmax()}</b>'
      rights += logits.argmax() == example['label']
    sources = page.value('performance.getEntriesByType("resource").map((entry) => entry.name)')
    origin = page.value('location.origin')
    assert page.messages == []
  assert rights >= PHOTOGRAPHS // 2
  assert len(sources) > 8 and all(source.startswith(f'{origin}/') for source in sources)


@chromium.needs_chromium
def test_page_shows_costs(page_folder, network_file, tmp_path):
  """Bytes of files; a width of a telephone and of a screen; what is no picture."""
  numbers = '[...document.querySelectorAll("#bytes tr")].map((e) => [...e.cells].map((c) =>'
  with demo_pages.opened(page_folder, tmp_path / 'profile') as page:
    rows = {name: cells for name, *cells in page.value(f'{numbers} c.textContent))')}
    sizes = {name: [int(cell.replace(',', '')) for cell in cells] for name, cells in rows.items()}
    floats = sum(4 * leaf.size for leaf in jax.tree.leaves(networks.load(network_file).variables))
    assert sizes['weights'] == [network_file.stat().st_size, floats]
    total = sum(
      path.stat().st_size
      for path in page_folder.rglob('*')
      if path.is_file() and path.name != 'package.json'
    )
    assert sizes['together'][0] == total
    assert sizes['together'][1] == total - sizes['weights'][0] + floats - decoder_size(page_folder)

    for width in (360, 1600):
      page.look(width)
      assert page.value('document.documentElement.scrollWidth') <= width

    other = tmp_path / 'other.png'
    other.write_bytes(b'no picture')
    page.choose('#picture', other)
    page.wait('document.getElementById("alert").textContent')
    told = page.value('document.getElementById("alert").textContent')
    assert told == 'other.png: found no picture that this browser reads'
    # by keyboard: the first thing that has the focus is the choice of a picture
    page.press('Tab')
    assert page.value('document.activeElement.id') == 'picture'


def decoder_size(folder):
  return (folder / 'opq.mjs').stat().st_size


@pytest.mark.skipif(shutil.which('node') is None, reason='found no node, expected Node.js')
def test_pictures_as_in_python(tmp_path):
  """Resized, cropped, standardised: the bits of `Preprocessing`, and so of Pillow."""
  rng = np.random.default_rng(0)
  shapes = ((256, 300), (299, 299), (701, 523), (90, 120), (225, 1200))
  images = [rng.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in shapes]
  of = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
  kinds = [
    Preprocessing(**of, resize=256, crop=224),
    Preprocessing(**of, resize=243, crop=224, resample='bicubic'),
  ]
  cases = []
  for number, image in enumerate(images):
    image.tofile(tmp_path / f'{number}.rgb')
    cases += [
      {
        'file': f'{number}.rgb',
        'width': image.shape[1],
        'height': image.shape[0],
        'kind': vars(kind),
      }
      for kind in kinds
    ]
  code = """
    import {readFileSync, writeFileSync} from 'node:fs';
    import {prepared, standardised} from 'PICTURES';
    JSON.parse(readFileSync('cases.json')).forEach(({file, width, height, kind}, number) => {
      const pixels = new Uint8Array(readFileSync(file));
      const seen = prepared({pixels, width, height}, kind);
      writeFileSync(`${number}.out`, standardised(seen.pixels, kind));
    });
    """.replace('PICTURES', (DEMO / 'pictures.mjs').as_uri())
  (tmp_path / 'cases.json').write_text(json.dumps(cases))
  command = ['node', '--input-type=module', '-e', code]
  run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
  assert run.returncode == 0, run.stderr
  expected = [kind(image) for image in images for kind in kinds]
  for number, array in enumerate(expected):
    found = np.fromfile(tmp_path / f'{number}.out', np.float32).reshape(224, 224, 3)
    np.testing.assert_array_equal(found, array, err_msg=str(cases[number]))

r"""Writes a page that runs a compressed network on pictures in a browser.

    npm pack onnxruntime-web@1.30.0 && tar xf onnxruntime-web-1.30.0.tgz    # makes package/
    opq compress mobilenet_v1.safetensors net.opq --model mobilenet_v1 --num-classes 1000
    python -m experiments.demo_page.make net.opq package OUT --classes classes.txt
    python -m http.server --directory OUT 8000

needs    a file of `opq compress --model` with a network of ImageNet, the unpacked npm package
         onnxruntime-web, `pip install opq_jax[jax2onnx]`.
gives    OUT, a folder of static files for any web server, and for none: it asks no other one.

    network.opq      the compressed weights
    network.onnx     the operations, without weights
    network.json     preprocessing and names of classes
    runtime/         onnxruntime-web: WebAssembly, one thread
    opq.mjs          the decoder, and what the page is made of
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import sys

import jax
import numpy as np

import opq_jax
from opq_jax.core import files
from opq_jax.export import onnx_program
from opq_jax.importers import networks

HERE = pathlib.Path(__file__).parent
PACKAGE = pathlib.Path(opq_jax.__file__).parent / 'report'
PARTS = (
  *(HERE / name for name in ('index.html', 'demo.css', 'main.mjs', 'pictures.mjs')),
  PACKAGE / 'page_parts' / 'page.css',
  PACKAGE / 'javascript' / 'opq.mjs',
)
SCRIPTS = 'ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs'
BINARY = 'ort-wasm-simd-threaded.wasm'


def write(
  network: str | os.PathLike[str],
  runtime: str | os.PathLike[str],
  out: str | os.PathLike[str],
  classes: str | os.PathLike[str] | None = None,
) -> None:
  """Writes the folder of the page.

  Args:
    network: an `.opq` file that names its network and the source of its weights.
    runtime: the folder of the npm package onnxruntime-web.
    out: the folder, which is new or empty.
    classes: a text with the name of one class a line, in the order of the logits.

  Raises:
    ValueError: a file is not of its kind, or has another number of classes.
    OSError: a file cannot be read or written.
  """
  loaded = networks.load(network)
  preprocessing = loaded.source.preprocessing
  side = preprocessing.crop
  if side is None:
    raise ValueError(f'{network}: found {loaded.name}, expected a network of cropped pictures')
  names = [] if classes is None else pathlib.Path(classes).read_text().splitlines()
  if classes is not None and len(names) != loaded.model.num_classes:
    raise ValueError(
      f'{classes}: found {len(names)} lines, expected {loaded.model.num_classes}, one a class'
    )
  program = onnx_program(
    loaded.model.apply, loaded.variables, jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  )
  with files.new_folder(out) as folder:
    runtime_bytes = _copy_runtime(pathlib.Path(runtime), folder / 'runtime')
    for part in PARTS:
      shutil.copyfile(part, folder / part.name)
    shutil.copyfile(network, folder / 'network.opq')
    (folder / 'network.onnx').write_bytes(program.SerializeToString())
    description = {
      'title': f'{loaded.name}, {loaded.model.num_classes} classes',
      'preprocessing': dataclasses.asdict(preprocessing),
      'classes': names,
      'runtimeScripts': runtime_bytes,
      'page': sum(part.stat().st_size for part in PARTS),
      'decoder': (folder / 'opq.mjs').stat().st_size,
    }
    (folder / 'network.json').write_text(json.dumps(description), encoding='utf-8')


def _copy_runtime(package: pathlib.Path, folder: pathlib.Path) -> int:
  """Copies what runs a program; returns the bytes of its scripts."""
  described = package / 'package.json'
  name = json.loads(described.read_text()).get('name') if described.exists() else 'no package.json'
  if name != 'onnxruntime-web':
    raise ValueError(f'{package}: found {name}, expected the npm package onnxruntime-web')
  folder.mkdir()
  for script in (*SCRIPTS, BINARY):
    shutil.copyfile(package / 'dist' / script, folder / script)
  shutil.copyfile(described, folder / 'package.json')  # its name, version and license
  return sum((folder / script).stat().st_size for script in SCRIPTS)


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('network', help='an .opq file of opq compress --model')
  parser.add_argument('runtime', help='the unpacked npm package onnxruntime-web')
  parser.add_argument('out', help='the folder to write, new or empty')
  parser.add_argument('--classes', help='a text with the name of one class a line')
  options = parser.parse_args(arguments)
  write(options.network, options.runtime, options.out, options.classes)


if __name__ == '__main__':
  main(sys.argv[1:])

"""Core ML packages of PyTorch's networks: compressed, exported into themselves, and read back.

    pip install torch coremltools
    python -m experiments.benchmarks.export.core_ml_packages FOLDER [NETWORK ...] [--targets ...]

FOLDER holds `mobilenet_v1.safetensors` (TF-slim), `mobilenet_v2.safetensors` (torchvision) and
`minilm.safetensors` (all-MiniLM-L6-v2, under PyTorch's names); ResNet-50 has random weights.
Packages are those of `coremltools.convert` for iOS 18: float16, BatchNorm folded into convolutions.
What coremltools decompresses of an exported package is compared with the `.opq` file, bit for bit.
The error is the share of the weights' energy.
Core ML itself runs on Apple's systems alone, so there is no time.
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import coremltools as ct
import numpy as np
import torch
from safetensors.numpy import load_file

import opq_jax
from experiments.benchmarks import harness
from opq_jax import cli, importers
from opq_jax.export import write_core_ml
from opq_jax.weights import read_weights
from tests.helpers import core_ml_programs, torch_networks
from tests.helpers.torch_networks import Tensors

MODULE = 'experiments.benchmarks.export.core_ml_packages'
TOKENS, LAYERS, HEADS = 128, 6, 12  # of MiniLM
NETWORKS = 'mobilenet_v1', 'mobilenet_v2', 'resnet50', 'minilm'
TARGETS = (
  '--bits-per-weight 4',
  '--bits-per-weight 3',
  '--sparsity 0.5 --bits 3',
  '--palette-bits 4',
)
F = torch.nn.functional


class Traced(torch.nn.Module):
  """A functional network whose tensors are parameters, so that they have names in a program."""

  def __init__(self, network: Callable[..., Any], tensors: Tensors, example: torch.Tensor):
    super().__init__()
    self.network, self.tensors = network, tensors
    with torch.no_grad():
      network(tensors, example)  # draws the tensors that are missing
    for name, tensor in tensors.items():
      self.register_parameter(name.replace('.', '_'), torch.nn.Parameter(tensor, False))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    for name in self.tensors:
      self.tensors[name] = getattr(self, name.replace('.', '_'))
    return self.network(self.tensors, x)


def minilm(t: Tensors, tokens: torch.Tensor) -> torch.Tensor:
  """BERT's encoder, from its paper; returns the last layer."""
  norm = lambda name, x: F.layer_norm(
    x, x.shape[-1:], t[f'{name}.weight'], t[f'{name}.bias'], 1e-12
  )
  dense = lambda name, x: F.linear(x, t[f'{name}.weight'], t[f'{name}.bias'])
  split = lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
  x = F.embedding(tokens, t['embeddings.word_embeddings.weight'])
  x = x + t['embeddings.position_embeddings.weight'][:TOKENS]
  x = x + t['embeddings.token_type_embeddings.weight'][0]
  x = norm('embeddings.LayerNorm', x)
  for layer in range(LAYERS):
    at = f'encoder.layer.{layer}'
    q, k, v = (split(dense(f'{at}.attention.self.{one}', x)) for one in ('query', 'key', 'value'))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = norm(f'{at}.attention.output.LayerNorm', x + dense(f'{at}.attention.output.dense', heads))
    hidden = F.gelu(dense(f'{at}.intermediate.dense', x))
    x = norm(f'{at}.output.LayerNorm', x + dense(f'{at}.output.dense', hidden))
  return x


def network_of(name: str, folder: pathlib.Path) -> tuple[Traced, torch.Tensor]:
  """Returns a network with weights, and an example of its input."""
  image = torch.zeros(1, 3, 224, 224)
  path = folder / f'{name}.safetensors'
  if name == 'mobilenet_v1':
    # under PyTorch's names; padding and epsilon stay those of TensorFlow
    variables = importers.load(name, path).variables
    tensors = Tensors(importers.to_tensors(name, variables, 'timm'), tensorflow=True)
    classes = tensors['classifier.bias'].shape[0]
    return Traced(lambda t, x: torch_networks.mobilenet_v1(t, x, classes), tensors, image), image
  if name == 'mobilenet_v2':
    network = lambda t, x: torch_networks.mobilenet_v2(t, x, 1000)
    return Traced(network, Tensors(load_file(path)), image), image
  if name == 'resnet50':
    network = lambda t, x: torch_networks.resnet(t, x, 1000, (3, 4, 6, 3), bottleneck=True)
    return Traced(network, Tensors(), image), image
  tokens = torch.zeros(1, TOKENS, dtype=torch.int32)
  return Traced(minilm, Tensors(load_file(path)), tokens), tokens


def convert(name: str, folder: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the package of a network."""
  network, example = network_of(name, folder)
  dtype = np.int32 if example.dtype == torch.int32 else np.float32
  with torch.no_grad(), core_ml_programs.temporary_folders():
    model = ct.convert(
      torch.export.export(network.eval(), (example,)).run_decompositions({}),
      inputs=[ct.TensorType(name='x', shape=example.shape, dtype=dtype)],
      minimum_deployment_target=ct.target.iOS18,
      skip_model_load=True,
    )
    model.save(str(path))


def row_of(name: str, folder: pathlib.Path, targets: str) -> dict[str, object]:
  """Compresses and exports a network; returns its sizes and forms."""
  with tempfile.TemporaryDirectory() as scratch:
    net, packed, small = (
      pathlib.Path(scratch, end) for end in ('net.mlpackage', 'net.opq', 'small.mlpackage')
    )
    convert(name, folder, net)
    if cli.main(['compress', str(net), str(packed), *targets.split()]):
      raise ValueError(f'{name}: opq compress failed')
    with opq_jax.OpqFile(packed) as file:
      written = write_core_ml(small, file, net)
      found, floats = core_ml_programs.weights(small), read_weights(net)
      exact = lost = total = weights = 0.0
      for leaf in written.leaves:
        exact += found[leaf.name].tobytes() == file[leaf.name].tobytes()
        before = floats[leaf.name].astype(np.float32)
        lost += np.sum(np.square(found[leaf.name].astype(np.float32) - before))
        total, weights = total + np.sum(np.square(before)), weights + before.size
    size = sum(part.stat().st_size for part in net.rglob('*') if part.is_file())
    return {
      'network': name,
      'targets': f'`{targets}`',
      'float16 package, bytes': size,
      '.opq': packed.stat().st_size,
      'exported package, bytes': written.size,
      'times smaller': round(size / written.size, 2),
      'bits of a weight in it': round(8 * sum(leaf.bytes for leaf in written.leaves) / weights, 2),
      'error of weights': f'{100 * lost / total:.2g} %',
      'leaves bit-equal': f'{exact:.0f} of {len(written.leaves)}',
      'of these sparse': sum(leaf.form.startswith('sparse') for leaf in written.leaves),
      'floats': sum(bool(leaf.reason) for leaf in written.leaves),
    }


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('networks', nargs='*', default=NETWORKS)
  parser.add_argument('--targets', action='append', help='options of opq compress')
  options = parser.parse_args(arguments)
  for name in options.networks:
    for targets in options.targets or TARGETS:
      rows = [row_of(name, options.folder, targets)]
      rows = harness.with_earlier('core_ml_packages', rows, ['network', 'targets'])
      rows.sort(key=lambda row: (NETWORKS.index(str(row['network'])), row['targets']))
      harness.report('core_ml_packages', 'Core ML packages', f'python -m {MODULE} FOLDER', rows)


if __name__ == '__main__':
  main(sys.argv[1:])

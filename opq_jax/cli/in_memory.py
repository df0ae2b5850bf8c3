"""`opq compress` of a tree in memory: a known network, or codes that are chosen jointly."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.text import Text

import opq_jax
from opq_jax import encoders
from opq_jax.cli.console import collected_warnings, console, note
from opq_jax.cli.leaves import chosen_paths, narrowed
from opq_jax.cli.stages import Stage, timed_stages
from opq_jax.cli.targets import targets_text
from opq_jax.core import files
from opq_jax.core.trees import PyTree
from opq_jax.file import rate as file_rate
from opq_jax.file import writer
from opq_jax.importers import networks
from opq_jax.report import four_sizes, payload_report, summary
from opq_jax.weights import read_weights

FROM_NOISE = 'corrected from noise'
FROM_SYNTHETIC = 'corrected from synthetic images'
BY_FEEDBACK = 'by error feedback, moments from synthetic images'
ALONG_TRELLIS = 'along a trellis'
BY_BOTH = f'{ALONG_TRELLIS}, {BY_FEEDBACK}'
INFERENCE_ONLY = 'BatchNorm in two vectors, vectors rounded to bfloat16'


def compress(
  arguments: argparse.Namespace,
  is_known: bool,
  targets: dict[str, float],
  axis: Callable[[str, Any], int],
  metadata: dict[str, str],
) -> None:
  """Reads all weights, compresses them, writes the file and prints the table of the whole.

  Args:
    arguments: of `opq compress`.
    is_known: whether the weights are those of a network of `opq_jax.models`.
    targets: as `opq_jax.allocate` or `file_rate` takes them.
    axis: path, leaf -> the axis of its output channels.
    metadata: of the file, as far as they are known before the weights are read.
  """
  source, output = Path(arguments.input), Path(arguments.output)
  stdout = console(sys.stdout)
  with timed_stages(stdout) as stage:
    with stage('read'):
      network = None
      if is_known:
        network = networks.load(
          source,
          name=arguments.model,
          source=arguments.source,
          num_classes=arguments.num_classes,
        )
        metadata |= networks.metadata(network)
      params = read_weights(source) if network is None else network.variables
      chosen = chosen_paths(params, arguments.include, arguments.exclude)
      original = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
      params = narrowed(params, chosen)
    compressor = _Compressor(arguments, network, params, chosen, axis, metadata, stage)
    if 'file_rate' in targets:
      by_bits: dict[float, _Compressed] = {}

      def size_of(bits: float) -> int:
        by_bits[bits] = compressor.compressed(bits_per_weight=bits)
        return len(by_bits[bits].data)

      weights = sum(leaf.size for leaf in jax.tree.leaves(params))
      with collected_warnings():
        bits = file_rate.bits_of_file(size_of, original, targets['file_rate'], weights)
      result = by_bits[bits]
    else:
      result = compressor.compressed(**targets)
    with stage('encode'):
      report = payload_report(result.data, params, channel_axis=axis)
    with stage('write'):
      files.write_bytes(output, result.data)
  for text in result.notes:
    note(text)
  stdout.print(summary(params, result.allocation), four_sizes(report))
  if network is not None:
    stdout.print(Text(_network_line(result.metadata)))
  stdout.print(Text(f'{output}: {report.file:,} bytes, {report.file_rate:.2f} times smaller'))


class _Compressed(NamedTuple):
  """The bytes of a file and how they came about; `notes` are warnings of the allocation."""

  data: bytes
  allocation: opq_jax.Allocation
  state: opq_jax.CompressionState
  metadata: dict[str, str]
  notes: list[str]


@dataclasses.dataclass
class _Compressor:
  """A tree in memory, compressed for one target or for several in turn."""

  arguments: argparse.Namespace
  network: networks.Network | None
  params: PyTree
  chosen: set[str]
  axis: Callable[[str, Any], int]
  metadata: dict[str, str]
  stage: Stage

  def compressed(self, **targets: float) -> _Compressed:
    """Returns the file for these targets."""
    metadata, network, arguments = dict(self.metadata), self.network, self.arguments
    if arguments.file_rate is not None:
      metadata['targets'] = targets_text({'file_rate': arguments.file_rate, **targets})
    moments = self._moments
    if arguments.trellis:
      metadata['codes'] = ALONG_TRELLIS
    if moments is not None:
      metadata['codes'] = BY_BOTH if arguments.trellis else BY_FEEDBACK
    with self.stage('allocate'), collected_warnings() as notes:
      options: dict[str, Any] = {
        'objective': arguments.objective,
        'compressible': lambda path, _: path in self.chosen,
        'channel_axis': self.axis,
        **targets,
      }
      encoder: encoders.Encoder = encoders.Rounding()
      if arguments.trellis:
        encoder = encoders.Trellis(moments)
      elif moments is not None:
        encoder = encoders.Feedback(moments)
      compressed, state, allocation = opq_jax.compress(self.params, encoder=encoder, **options)
    stored = compressed if 'codes' in metadata else self.params
    if network is not None and networks.has_batch_norm(self.params):
      metadata['batch_norm'] = 'not corrected'
      if not arguments.no_correction:
        metadata['batch_norm'] = FROM_NOISE if moments is None else FROM_SYNTHETIC
        with self.stage('correct BatchNorm'):
          stored = networks.correct_batch_norm(network, compressed, images=self._images)
    if network is not None and arguments.inference_only:
      metadata['inference_only'] = INFERENCE_ONLY
      stored = networks.for_inference(network, stored)
    with self.stage('encode'):
      data = writer.serialize(stored, state, metadata, contexts=not arguments.fast)
    return _Compressed(data, allocation, state, metadata, notes)

  @functools.cached_property
  def _images(self) -> Any:
    """Synthetic calibration inputs, where error feedback is asked for."""
    if self.network is None or not self.arguments.feedback:
      return None
    with self.stage('synthetic images'):
      return jax.block_until_ready(networks.synthetic_batches(self.network))

  @functools.cached_property
  def _moments(self) -> PyTree | None:
    if self._images is None or self.network is None:
      return None
    with self.stage('moments'):
      return jax.block_until_ready(
        opq_jax.network.mean_moments(self.network.model.apply, self.params, self._images)
      )


def _network_line(metadata: dict[str, str]) -> str:
  """Returns which network a file holds, and how its BatchNorm was corrected."""
  batch_norm = metadata.get('batch_norm')
  return (
    f'{metadata["model"]}, {metadata["num_classes"]} classes, by the names of '
    f'{metadata["source"]}; ' + (f'BatchNorm {batch_norm}' if batch_norm else 'no BatchNorm')
  )

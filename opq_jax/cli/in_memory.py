"""`opq compress` of a tree in memory: a known network, or a format that is read as a whole."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import opq_jax
from opq_jax.cli import steps
from opq_jax.cli.console import collected_warnings, console, note
from opq_jax.cli.encoding import (
  FEEDBACK,
  IMAGES,
  LAYER_BY_LAYER,
  MAX_IMAGES,
  MEANS,
  NOISE,
  PALETTE_BITS,
  ROUNDING,
  SYNTHETIC,
  TRELLIS,
  UNCORRECTED,
  Encoding,
  channel_axis,
  slices_of,
)
from opq_jax.cli.folders import carried_notes, carried_of
from opq_jax.cli.graphs import planned_by_graph
from opq_jax.cli.leaves import checked_slices, chosen_paths, names_note, narrowed
from opq_jax.cli.optimizers import report_without_optimizer, without_optimizer
from opq_jax.cli.results import print_result
from opq_jax.cli.stages import Stage, timed_stages
from opq_jax.cli.uncorrected import uncorrected
from opq_jax.core import files, trees
from opq_jax.core.trees import PyTree
from opq_jax.file import rate as file_rate
from opq_jax.file import writer
from opq_jax.importers import networks
from opq_jax.importers.networks import Network
from opq_jax.report import payload_report
from opq_jax.weights import GraphUse, read_weights


def compress(
  arguments: argparse.Namespace,
  is_known: bool,
  plan: Encoding,
  about: dict[str, str],
  graph: Mapping[str, GraphUse] | None = None,
) -> None:
  """Reads all weights, compresses them, writes the file and prints the table of the whole.

  Args:
    arguments: of `opq compress`.
    is_known: whether the weights are those of a network of `opq_jax.models`.
    plan: targets, objective and channel axis.
    about: further metadata of the file.
    graph: how the graph of an ONNX file uses its weights.
  """
  source, output = Path(arguments.input), Path(arguments.output)
  stdout = console(sys.stdout)
  carried = carried_of(source, is_known)
  with timed_stages(stdout, not arguments.json) as stage, contextlib.ExitStack() as kept:
    with stage('read'):
      network = images = None
      if is_known:
        network = networks.load(
          source,
          name=arguments.model,
          source=arguments.source,
          num_classes=arguments.num_classes,
        )
        about |= networks.metadata(network)
      plan = _planned(arguments, plan, network)
      if network is not None and arguments.images is not None:
        limit = MAX_IMAGES if arguments.max_images is None else arguments.max_images
        images = steps.folder_images(network, arguments.images, limit)
        plan = dataclasses.replace(plan, images=images.images)
      line, left_out = '', 0
      with collected_warnings() as read_notes:
        params = (
          read_weights(source, optimizer=arguments.keep_optimizer)
          if network is None
          else network.variables
        )
      if not arguments.keep_optimizer:
        params, left_out, line = without_optimizer(params)
        plan = dataclasses.replace(plan, optimizer=MEANS if line else None)
      chosen = chosen_paths(params, arguments.include, arguments.exclude, graph)
      plan = planned_by_graph(plan, graph, chosen)
      slices = checked_slices(plan.slices, chosen)
      by_name = '' if arguments.include else names_note(params, chosen, arguments.exclude, graph)
      original = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params)) - left_out
      params = narrowed(params, chosen)
    calibration = kept.enter_context(steps.calibrated(network, plan, images, stage))
    compressor = _Compressor(
      network,
      params,
      chosen,
      plan,
      about,
      calibration,
      stage,
      contexts=not arguments.fast,
      side_files=carried.files,
    )
    if 'file_rate' in plan.targets:
      by_bits: dict[float, _Compressed] = {}
      palettes = {name: plan.targets[name] for name in plan.targets if name == PALETTE_BITS}

      def size_of(bits: float) -> int:
        by_bits[bits] = compressor.compressed(bits_per_weight=bits, **palettes)
        return len(by_bits[bits].data)

      weights = sum(leaf.size for leaf in jax.tree.leaves(params))
      with collected_warnings() as notes:
        bits = file_rate.bits_of_file(size_of, original, plan.targets['file_rate'], weights)
      result = by_bits[bits]
      result = result._replace(notes=[*notes, *result.notes])
    else:
      result = compressor.compressed(**plan.targets)
    with stage('encode'):
      axis = channel_axis(plan.metadata(), slices)
      report = payload_report(result.data, params, channel_axis=axis)
      report = report_without_optimizer(report) if line else report
    with stage('write'):
      files.write_bytes(output, result.data)
  folder_notes = carried_notes(source, carried)
  found = None if plan.batch_norm else uncorrected(trees.named_leaves(params), chosen)
  left = found and found.line()
  for text in filter(None, (*folder_notes, *read_notes, line, by_name, *result.notes, left)):
    note(text)
  lines = [] if network is None else [_network_line(network, plan)]
  if images is not None:
    used = images.images.number
    lines.append(f'{arguments.images}: {used:,} of {images.total:,} images used')
  metadata = {**about, **plan.metadata()}
  print_result(arguments, params, result.allocation, report, metadata, carried.files, lines)


def _planned(arguments: argparse.Namespace, plan: Encoding, network: Network | None) -> Encoding:
  """Returns the plan with encoder and BatchNorm correction, and the source of their images.

  Raises:
    ValueError: nothing of the plan reads the images that are given.
  """
  source = SYNTHETIC if arguments.images is None else IMAGES
  name = TRELLIS if arguments.trellis else FEEDBACK if arguments.feedback else ROUNDING
  is_joint = arguments.layer_by_layer
  batch_norm = None
  if network is not None and networks.has_batch_norm(network.variables):
    is_calibrated = arguments.feedback or is_joint or source == IMAGES
    batch_norm = source if is_calibrated else NOISE
    if arguments.no_correction:
      batch_norm = UNCORRECTED
  plan = dataclasses.replace(
    plan,
    encoder=LAYER_BY_LAYER if is_joint else name,
    first=name if is_joint else None,
    trellis_version=opq_jax.encoders.TRELLIS_VERSION if name == TRELLIS else None,
    moments=source if arguments.feedback else None,
    inputs=source if is_joint else None,
    batch_norm=batch_norm,
    inference_only=arguments.inference_only,
  )
  if network is not None and source == IMAGES and not plan.reads_images:
    raise ValueError(
      f'--images: found {arguments.images}, expected --feedback or --layer-by-layer too: '
      f'{network.name} has no BatchNorm, and nothing else reads images'
    )
  return plan


class _Compressed(NamedTuple):
  """The bytes of a file and how they came about; `notes` are warnings of the allocation."""

  data: bytes
  allocation: opq_jax.Allocation
  state: opq_jax.CompressionState
  notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Compressor:
  """A tree in memory, compressed for one target or for several in turn."""

  network: Network | None
  params: PyTree
  chosen: set[str]
  plan: Encoding
  about: dict[str, str]
  calibration: steps.Calibration
  stage: Stage
  contexts: bool
  side_files: Mapping[str, bytes]

  def compressed(self, **targets: float) -> _Compressed:
    """Returns the file for these targets."""
    plan, network = self.plan, self.network
    plan = dataclasses.replace(plan, targets={**plan.targets, **targets})
    options: dict[str, Any] = {'objective': plan.objective, **targets}
    slices = slices_of(plan.slices)
    with self.stage('allocate'), collected_warnings() as notes:
      params, state, allocation = opq_jax.compress(
        self.params,
        encoder=steps.encoder_of(network, plan, self.calibration),
        compressible=lambda path, _: path in self.chosen,
        channel_axis=channel_axis(plan.metadata(), slices),
        slices=slices,
        **options,
      )
    # rounded codes are those of the original weights themselves
    stored = self.params if plan.encoder == ROUNDING else params
    if network is not None and plan.batch_norm not in (None, UNCORRECTED):
      with self.stage('correct BatchNorm'):
        stored = steps.corrected(network, params, plan, self.calibration)
    if network is not None and plan.inference_only:
      stored = networks.for_inference(network, stored)
    with self.stage('encode'):
      metadata = {**self.about, **plan.metadata()}
      data = writer.serialize(
        stored, state, metadata, contexts=self.contexts, side_files=self.side_files
      )
    return _Compressed(data, allocation, state, notes)


_BATCH_NORM = {
  None: 'no BatchNorm',
  UNCORRECTED: 'BatchNorm not corrected',
  NOISE: 'BatchNorm corrected from noise',
  SYNTHETIC: 'BatchNorm corrected from synthetic images',
  IMAGES: 'BatchNorm corrected from images',
}


def _network_line(network: Network, plan: Encoding) -> str:
  """Returns which network a file holds, and how its BatchNorm was corrected."""
  return (
    f'{network.name}, {network.model.num_classes} classes, by the names of '
    f'{network.source.name}; {_BATCH_NORM[plan.batch_norm]}'
  )

"""`opq compress` of a tree that need not fit into memory."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from opq_jax.cli.console import collected_warnings, console, note
from opq_jax.cli.encoding import DIVERGENCE, MEANS, TRELLIS, Encoding, channel_axis
from opq_jax.cli.folders import carried_notes, carried_of
from opq_jax.cli.graphs import planned_by_graph
from opq_jax.cli.leaves import checked_slices, chosen_paths, names_note, narrowed
from opq_jax.cli.optimizers import (
  WithoutOptimizer,
  report_without_optimizer,
  without_optimizer,
)
from opq_jax.cli.results import print_result
from opq_jax.cli.stages import Stage, timed_stages
from opq_jax.cli.uncorrected import uncorrected
from opq_jax.core import trees
from opq_jax.core.trees import PyTree
from opq_jax.file import OpqFile
from opq_jax.weights import GraphUse, StreamedFile, compress_stored, open_weights

if TYPE_CHECKING:
  from opq_jax.language import StoredNetwork


def compress(
  arguments: argparse.Namespace,
  network: 'StoredNetwork | None',
  plan: Encoding,
  about: dict[str, str],
  graph: Mapping[str, GraphUse] | None = None,
) -> None:
  """Reads, encodes and writes one leaf after the other, and prints the table of the whole.

  Args:
    arguments: of `opq compress`.
    network: the language model whose weights they are, where it is read too.
    plan: targets, objective and channel axis.
    about: further metadata of the file.
    graph: how the graph of an ONNX file uses its weights.
  """
  source, output = Path(arguments.input), Path(arguments.output)
  stdout = console(sys.stdout)
  with collected_warnings() as read_notes:
    tree, left_out, line = WithoutOptimizer(open_weights(source), 0, '')
  if not arguments.keep_optimizer:
    tree, left_out, line = without_optimizer(tree)
    plan = dataclasses.replace(plan, optimizer=MEANS if line else None)
  chosen = chosen_paths(tree, arguments.include, arguments.exclude, graph)
  plan = planned_by_graph(plan, graph, chosen)
  slices = checked_slices(plan.slices, chosen)
  by_name = '' if arguments.include else names_note(tree, chosen, arguments.exclude, graph)
  tree = narrowed(tree, chosen)
  carried = carried_of(source)
  with timed_stages(stdout, not arguments.json) as stage, collected_warnings() as notes:
    run: Callable[..., StreamedFile] = compress_stored
    objective: Any = plan.objective
    if arguments.calibration is not None:
      assert network is not None
      run, plan = _calibrated(arguments, network, plan, stage)
      objective = None if plan.objective == DIVERGENCE else plan.objective
    else:
      if plan.objective == DIVERGENCE:
        assert network is not None
        objective, plan = _costs(arguments, network, tree, plan, stage)
        objective = costs_of_slices(objective, tree, slices)
      if arguments.trellis:
        run, plan = _along_a_trellis(plan)
    about_file = functools.partial(_metadata, about, plan)
    done = run(
      tree,
      output,
      compressible=lambda path, _: path in chosen,
      channel_axis=channel_axis(plan.metadata(), slices),
      slices=slices,
      metadata=about_file,
      contexts=not arguments.fast,
      side_files=carried.files,
      objective=objective,
      stage=stage,
      left_out=left_out,
      **plan.targets,
    )
  folder_notes = (*read_notes, *carried_notes(source, carried))
  found = uncorrected(trees.named_leaves(tree), chosen)
  for text in filter(None, (*folder_notes, line, by_name, *notes, found and found.line())):
    note(text)
  report = report_without_optimizer(done.report) if line else done.report
  with OpqFile(output) as file:
    metadata = file.metadata
  print_result(arguments, tree, done.allocation, report, metadata, carried.files)


def _metadata(
  about: Mapping[str, str], plan: Encoding, targets: Mapping[str, Any]
) -> dict[str, str]:
  """Returns the metadata of a file.

  Args:
    about: what does not depend on the plan.
    plan: how the file is made.
    targets: that were met: beside a file rate, the bits per weight.
  """
  # the allocation of rounded codes is in the file, that of codes along a trellis is not
  if plan.encoder == TRELLIS and 'bits_per_weight' in targets:
    bits = {'bits_per_weight': targets['bits_per_weight']}
    plan = dataclasses.replace(plan, targets={**plan.targets, **bits})
  return {**about, **plan.metadata()}


def _along_a_trellis(plan: Encoding) -> tuple[Callable[..., StreamedFile], Encoding]:
  """Returns `compress_stored` of codes along a trellis, and the plan with them."""
  from opq_jax import encoders

  version = encoders.TRELLIS_VERSION
  plan = dataclasses.replace(plan, encoder=TRELLIS, trellis_version=version)
  return functools.partial(compress_stored, encoder=encoders.Trellis()), plan


def _costs(
  arguments: argparse.Namespace,
  network: 'StoredNetwork',
  tree: PyTree,
  plan: Encoding,
  stage: Stage,
) -> tuple[PyTree, Encoding]:
  """Returns what an error in each leaf costs the answers, and the plan with the tokens."""
  from opq_jax.cli import calibration
  from opq_jax.language import costs

  found = calibration.calibrated(arguments, network, stage)
  with stage('costs') as told:
    objective = costs(network, found, tree, told=told)
  return objective, calibration.planned(arguments, plan, found)


def costs_of_slices(objective: PyTree, tree: PyTree, slices: Callable[[str, Any], int]) -> PyTree:
  """Returns costs with one number for each leaf that has slices: these share no outputs."""
  named = trees.named_leaves(tree)
  costs = [
    float(np.mean(cost)) if slices(name, leaf) else cost
    for (name, leaf), cost in zip(named.items(), jax.tree.leaves(objective), strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(tree), costs)


def _calibrated(
  arguments: argparse.Namespace, network: 'StoredNetwork', plan: Encoding, stage: Stage
) -> tuple[Callable[..., StreamedFile], Encoding]:
  """Returns `compress_stored` with what calibration tokens say, and the plan with them."""
  from opq_jax.cli import calibration
  from opq_jax.language import compress_calibrated

  found = calibration.calibrated(arguments, network, stage)
  plan = calibration.planned(arguments, plan, found)
  encoder = calibration.encoder_of(plan)

  run = functools.partial(compress_calibrated, network, calibration=found, encoder=encoder)
  return run, plan

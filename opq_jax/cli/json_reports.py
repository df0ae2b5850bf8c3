"""Reports of a file's sizes and of its verification as JSON, for `--json`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opq_jax.cli.uncorrected import uncorrected_in

if TYPE_CHECKING:
  from opq_jax.report import SizeReport, Verification

_TOTALS = (
  *('weights', 'survivors', 'sparsity', 'escaped', 'original', 'as_float32', 'nominal', 'packed'),
  *('entropy', 'file', 'headers', 'side_files', 'bits_per_weight'),
  *('dead_leaves', 'dead_channels', 'dead_rows'),
)
_RATES = {
  'nominal_rate': 'compressed leaves in float32',
  'packed_rate': 'compressed leaves in float32',
  'entropy_rate': 'compressed leaves in float32',
  'file_rate': 'all leaves as they came',
}
"""The bytes that each rate is relative to."""


def sizes_as_json(
  path: str,
  metadata: Mapping[str, str],
  report: 'SizeReport',
  leaves: Sequence[str],
  side_files: Mapping[str, int],
) -> dict[str, Any]:
  """Returns what a file holds and what is not corrected, for `json.dumps`.

  Args:
    path: the file.
    metadata: its metadata.
    report: its sizes.
    leaves: the names of its leaves.
    side_files: the sizes of its side files by name.
  """
  return {
    'path': path,
    'metadata': metadata,
    'totals': _totals(report),
    'uncorrected': uncorrected_in(metadata, leaves, [leaf.path for leaf in report.compressed]),
    'compressed': [dataclasses.asdict(leaf) for leaf in report.compressed],
    'uncompressed': [dataclasses.asdict(leaf) for leaf in report.uncompressed],
    'side_files': dict(side_files),
  }


def verification_as_json(
  path: str, against: str, metadata: Mapping[str, str], verified: 'Verification'
) -> dict[str, Any]:
  """Returns what a verification found, for `json.dumps` without infinities."""
  # the relative error of a leaf of zeros that was decoded to anything else is infinite
  finite = lambda leaf: {
    name: value if not isinstance(value, float) or math.isfinite(value) else None
    for name, value in dataclasses.asdict(leaf).items()
  }
  return {
    'path': path,
    'against': against,
    'metadata': metadata,
    'holds': verified.holds,
    'problems': verified.problems,
    'exact': verified.exact,
    'corrected': verified.corrected,
    'compressed': [finite(leaf) for leaf in verified.compressed],
    'totals': verified.report and _totals(verified.report),
  }


def _totals(report: 'SizeReport') -> dict[str, Any]:
  totals = {name: getattr(report, name) for name in (*_TOTALS, *_RATES)}
  return {**totals, 'rates_are_against': _RATES}

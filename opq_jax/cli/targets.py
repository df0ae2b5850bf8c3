"""What a file claims of its targets in its metadata, against what it holds."""

from opq_jax.cli.encoding import PALETTE_BITS, ROUNDING, Encoding
from opq_jax.core.limits import levels_of_palette
from opq_jax.report import SizeReport
from opq_jax.report.cell_checks import VerifiedLeaf

_TOLERANCE = 5e-3
"""Relative: an allocation that takes more bits than asked by more than this is refused."""


def target_problems(
  encoding: Encoding, leaves: tuple[VerifiedLeaf, ...], report: SizeReport | None
) -> list[str]:
  """Returns the targets that a file misses, a line each.

  Palettes have their levels and no escaped weights; a file is as small as its rate; rounded codes
  take no more bits than asked (those of other encoders, whose bits are searched for, may).

  Args:
    encoding: of the file's metadata.
    leaves: of the verification.
    report: of the file; None where sizes are not known.
  """
  problems, targets = [], encoding.targets
  if (bits := targets.get(PALETTE_BITS)) is not None:
    most = levels_of_palette(int(bits))
    for leaf in leaves:
      if leaf.levels > most or leaf.escaped:
        problems.append(
          f'{leaf.path}: found {leaf.levels} levels a sign and {leaf.escaped} escaped weights, '
          f'expected {most} at most and none, of {PALETTE_BITS} {int(bits)}'
        )
  if report is None:
    return problems
  rate = targets.get('file_rate')
  if rate is not None and report.file_rate < rate * (1 - _TOLERANCE):
    problems.append(f'file_rate: found {report.file_rate:.4g}, expected {rate:.4g} or more')
  asked = targets.get('bits_per_weight')
  if rate is None and asked is None and 'compression_rate' in targets:
    asked = 32 / targets['compression_rate']
  # a value that is stored exactly counts whole in the entropy, and takes less in the file
  taken = [
    min(leaf.entropy, leaf.file) if leaf.escaped else leaf.entropy for leaf in report.compressed
  ]
  found = 8 * sum(taken) / max(report.weights, 1)
  if encoding.encoder == ROUNDING and asked is not None and found > asked * (1 + _TOLERANCE):
    problems.append(f'bits per weight: found {found:.4g}, expected {asked:.4g} or fewer')
  return problems

"""Plots of results; needs matplotlib (`pip install opq_jax[plots]`)."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from opq_jax.core import extras

# Okabe and Ito's palette, distinct for colour-blind readers too
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#F0E442')


@dataclasses.dataclass(frozen=True)
class Curve:
  """Accuracy over size for one method of compression.

  Attributes:
    label: the method's name in the legend; curves of one label share a colour.
    sizes: bytes of the files, in any order.
    accuracies: the accuracy of each file, 0 ... 1.
    bounds: lower and upper end of each accuracy's interval, drawn as a band; none by default.
    variant: the name of a variant of several methods, drawn dashed and named once in the legend;
      '' for a solid curve.
  """

  label: str
  sizes: Sequence[float]
  accuracies: Sequence[float]
  bounds: Sequence[tuple[float, float]] = ()
  variant: str = ''


def accuracy_over_size(
  path: str | os.PathLike[str],
  curves: Sequence[Curve],
  *,
  baseline: float | None = None,
  title: str = '',
  ylabel: str = 'top-1 accuracy',
) -> None:
  """Plots accuracy over file size.

  Args:
    path: the picture; its suffix selects the format.
    curves: the curves.
    baseline: accuracy of the uncompressed network, drawn as a dotted line.
    title: the title.
    ylabel: the name of the accuracy.

  Raises:
    ValueError: there is no curve, the sizes, accuracies and bounds of a curve differ in number, or
      matplotlib is missing.
  """
  if not curves:
    raise ValueError('curves: found none, expected at least one')
  for curve in curves:
    counts = len(curve.sizes), len(curve.accuracies), len(curve.bounds) or len(curve.sizes)
    if len(set(counts)) > 1 or not counts[0]:
      raise ValueError(
        f'{curve.label}: found {counts[0]} sizes, {counts[1]} accuracies and {len(curve.bounds)} '
        'bounds, expected equally many (or no bounds)'
      )
  # Figure instead of pyplot, which would choose a backend and change global state
  figure = _matplotlib_figure()(figsize=(7.2, 4.5), dpi=120, layout='constrained')
  axes = figure.subplots()
  colours = dict(zip(dict.fromkeys(c.label for c in curves), _COLOURS * len(curves), strict=False))
  for curve in curves:
    order = sorted(range(len(curve.sizes)), key=lambda i, curve=curve: curve.sizes[i])  # type: ignore[misc]
    megabytes = [curve.sizes[i] / 1e6 for i in order]
    colour = colours[curve.label]
    axes.plot(
      megabytes,
      [100 * curve.accuracies[i] for i in order],
      color=colour,
      linestyle='--' if curve.variant else '-',
      linewidth=1.2 if curve.variant else 1.8,
      marker='o',
      markersize=3 if curve.variant else 5,
      label=None if curve.variant else curve.label,
    )
    if curve.bounds:
      lower, upper = ([100 * curve.bounds[i][end] for i in order] for end in (0, 1))
      axes.fill_between(megabytes, lower, upper, color=colour, alpha=0.12, linewidth=0)
  for variant in dict.fromkeys(curve.variant for curve in curves if curve.variant):
    axes.plot([], [], color='grey', linestyle='--', linewidth=1.2, label=variant)
  if baseline is not None:
    label = f'float32: {100 * baseline:.1f} %'
    axes.axhline(100 * baseline, color='black', linestyle=':', linewidth=1.2, label=label)
  axes.set_xlabel('file size, MB (1 MB = 1,000,000 bytes)')
  axes.set_ylabel(f'{ylabel}, %')
  axes.set_title(title, fontsize=10, loc='left')
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(fontsize=9, framealpha=0.85, edgecolor='none')
  figure.savefig(path)


def accuracy_over_epochs(
  path: str | os.PathLike[str],
  epochs: Sequence[float],
  accuracies: Sequence[float],
  *,
  baseline: float | None = None,
  title: str = '',
) -> None:
  """Plots test accuracy over the epochs of finetuning; epoch 0 is the one-shot network.

  Args:
    path: the picture; its suffix selects the format.
    epochs: the epochs.
    accuracies: the accuracy after each epoch, 0 ... 1.
    baseline: accuracy of the uncompressed network, drawn as a dotted line.
    title: the title.

  Raises:
    ValueError: there is no point, epochs and accuracies differ in number, or matplotlib is missing.
  """
  if not epochs or len(epochs) != len(accuracies):
    raise ValueError(
      f'epochs: found {len(epochs)} and {len(accuracies)} accuracies, expected equally many'
    )
  figure = _matplotlib_figure()(figsize=(7.2, 4.5), dpi=120, layout='constrained')
  axes = figure.subplots()
  axes.plot(epochs, [100 * a for a in accuracies], color=_COLOURS[0], marker='o', linewidth=1.8)
  if baseline is not None:
    label = f'float32: {100 * baseline:.2f} %'
    axes.axhline(100 * baseline, color='black', linestyle=':', linewidth=1.2, label=label)
    axes.legend(frameon=False, fontsize=9)
  axes.set_xlabel('epochs of finetuning')
  axes.set_ylabel('top-1 accuracy, %')
  axes.set_title(title, fontsize=10, loc='left')
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path)


def seconds_over_weights(
  path: str | os.PathLike[str], curves: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
  """Plots seconds over the number of weights, both on logarithmic axes.

  Args:
    path: the picture; its suffix selects the format.
    curves: points of (weights, seconds) by the name in the legend.  A dotted line through the last
      point of the first curve shows time in proportion to the weights.

  Raises:
    ValueError: there is no point, or matplotlib is missing.
  """
  if not curves or not all(curves.values()):
    raise ValueError(f'curves: found {dict(curves)}, expected at least one point in each')
  figure = _matplotlib_figure()(figsize=(7.2, 4.5), dpi=120, layout='constrained')
  axes = figure.subplots()
  for (label, points), colour in zip(curves.items(), itertools.cycle(_COLOURS), strict=False):
    weights, seconds = zip(*sorted(points), strict=True)
    axes.plot(weights, seconds, color=colour, marker='o', linewidth=1.8, label=label)
  points = sorted(next(iter(curves.values())))
  (smallest, _), (largest, seconds_of_largest) = points[0], points[-1]
  ends = [seconds_of_largest * smallest / largest, seconds_of_largest]
  axes.plot(
    [smallest, largest], ends, color='black', linestyle=':', linewidth=1.2, label='in proportion'
  )
  axes.set_xscale('log')
  axes.set_yscale('log')
  axes.set_xlabel('weights')
  axes.set_ylabel('seconds')
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=9)
  figure.savefig(path)


def divergence_over_bits(
  path: str | os.PathLike[str],
  curves: Mapping[str, Sequence[tuple[float, float]]],
  *,
  title: str = '',
) -> None:
  """Plots the divergence of language models over their bits, on a logarithmic axis.

  Args:
    path: the picture; its suffix selects the format.
    curves: points of (bits per weight, KL in nats a token) by the name in the legend.
    title: the title.

  Raises:
    ValueError: there is no point, or matplotlib is missing.
  """
  if not curves or not all(curves.values()):
    raise ValueError(f'curves: found {dict(curves)}, expected at least one point in each')
  figure = _matplotlib_figure()(figsize=(7.2, 5.4), dpi=120, layout='constrained')
  axes = figure.subplots()
  markers = itertools.cycle('osD^vPX*')
  for number, ((label, points), marker) in enumerate(zip(curves.items(), markers, strict=False)):
    bits, divergences = zip(*sorted(points), strict=True)
    axes.plot(
      bits,
      divergences,
      color=_COLOURS[number % len(_COLOURS)],
      linestyle='-' if number < len(_COLOURS) else '--',
      marker=marker,
      markersize=4,
      linewidth=1.4,
      label=label,
    )
  axes.set_yscale('log')
  axes.set_xlabel('bits per weight')
  axes.set_ylabel('KL(float || compressed), nats per token')
  axes.set_title(title, fontsize=10, loc='left')
  axes.grid(alpha=0.25, which='both')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(path)


def _matplotlib_figure() -> Any:
  return extras.require('matplotlib.figure', 'plots', 'plots').Figure

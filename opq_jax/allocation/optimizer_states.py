"""Recognition of an optimizer's state beside the parameters of a training checkpoint.

Adam's second moments are squares of gradients, of 1e-12 and less: pruned to 0 they divide a step by
nothing but epsilon, and training is lost within three steps.  Moments have the shapes of the
parameters, so neither shapes nor their last names (`kernel`) tell them apart; their place does.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

_STATES = re.compile(
  r'(opt|optim|optimizer)_(state|states|weights)(_dict)?|optimizers?|optim'
  # tensors of torch.optim, which no network has
  r'|(max_)?exp_avg(_sq)?|square_avg|momentum_buffer'
)
"""Parts of a path that only an optimizer's state has."""

_PAIRS = (('mu', 'nu'), ('m', 'v'))
"""Subtrees of first and second moments, side by side.  Alone, `mu` is the head of a variational
autoencoder, and `v` the values of attention."""

_SINGLE = ('trace', 'momentum', 'velocity', 'acc_grads')
"""Subtrees of one number for every parameter."""


_MAX_PARTS = 64  # of a path that is looked at: a hostile one has many


def is_in_optimizer(path: str) -> bool:
  """Returns whether a part of a path is the name of an optimizer's state.

  >>> is_in_optimizer('opt_state/0/nu/params/kernel'), is_in_optimizer('params/mu/kernel')
  (True, False)
  """
  return any(_STATES.fullmatch(part) for part in _parts(path))


def optimizer_leaves(leaves: Mapping[str, Any]) -> list[str]:
  """Returns the paths of the leaves of optimizers, in the order of the tree.

  A leaf is one by its path (`is_in_optimizer`), or by the structure around it: it lies in one of
  `mu` and `nu`, side by side and alike; or in one of `m` and `v`, or in `trace`, `momentum`, ...,
  and the leaves there have the names and shapes of all matrices of a network elsewhere.

  Args:
    leaves: by path; anything with a shape.

  >>> params = {'net/w': np.zeros((3, 2)), 'mu/net/w': np.ones((3, 2)), 'nu/net/w': np.ones((3, 2))}
  >>> optimizer_leaves(params)
  ['mu/net/w', 'nu/net/w']
  """
  places = {path: parts for path in leaves if len(parts := _parts(path)) <= _MAX_PARTS}
  names = {name for pair in _PAIRS for name in pair} | set(_SINGLE)
  subtrees: dict[tuple[str, ...], dict[tuple[str, ...], tuple[int, ...]]] = {}
  for path, parts in places.items():
    for i, part in enumerate(parts[:-1]):
      if part in names:
        rest = subtrees.setdefault(parts[: i + 1], {})
        rest[parts[i + 1 :]] = np.shape(leaves[path])
  found = set()
  for place, subtree in subtrees.items():
    *above, name = place
    partner = next((pair for pair in _PAIRS if name in pair), None)
    is_paired = partner is not None and all(
      subtrees.get((*above, other)) == subtree for other in partner
    )
    if is_paired and partner == _PAIRS[0]:  # nothing else: the parameters may be in another file
      found.add(place)
    elif is_paired or name in _SINGLE:
      twins = {twin for twin, leaves_of in subtrees.items() if leaves_of == subtree}
      shapes = {
        parts: np.shape(leaves[path])
        for path, parts in places.items()
        if not _is_below(parts, twins)
      }
      if _is_of_network(subtree, shapes):
        found.add(place)
  return [
    path for path, parts in places.items() if is_in_optimizer(path) or _is_below(parts, found)
  ]


def _is_below(parts: tuple[str, ...], subtrees: Collection[tuple[str, ...]]) -> bool:
  return any(parts[:i] in subtrees for i in range(1, len(parts)))


def _is_of_network(
  subtree: Mapping[tuple[str, ...], tuple[int, ...]],
  shapes: Mapping[tuple[str, ...], tuple[int, ...]],
) -> bool:
  """Returns whether leaves mirror a network: in one place all matrices of `shapes`, and no more."""
  first = next(iter(subtree))
  matrices = {parts for parts, shape in shapes.items() if len(shape) > 1}
  for parts in shapes:
    place = parts[: len(parts) - len(first)]
    if parts[len(place) :] != first:
      continue
    originals = {(*place, *rest): shape for rest, shape in subtree.items()}
    if matrices <= originals.keys() and originals.items() <= shapes.items():
      return True
  return False


def _parts(path: str) -> tuple[str, ...]:
  return tuple(part for part in re.split(r'[/.\[\]\'"]+', path) if part)

"""Tells how many bytes of all leaves are done, for whoever shows progress."""

from collections.abc import Callable, Iterator, Mapping


def told_of(sizes: Mapping[str, int], told: Callable[[int, int], object] | None) -> Iterator[str]:
  """Yields names, and tells after each how many bytes are done, and how many there are.

  Args:
    sizes: bytes of leaves, by name.
    told: takes both numbers; or None.

  >>> list(told_of({'a': 12, 'b': 4}, lambda done, total: print(done, 'of', total)))
  12 of 16
  16 of 16
  ['a', 'b']
  """
  done, total = 0, sum(sizes.values())
  for name, size in sizes.items():
    yield name
    done += size
    if told is not None:
      told(done, total)

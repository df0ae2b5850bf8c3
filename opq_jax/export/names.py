"""Names for what an export adds to a model of another format."""


def fresh_name(base: str, taken: set[str]) -> str:
  """Returns a name that a model does not have yet, and takes it.

  >>> taken = {'mask'}
  >>> fresh_name('mask', taken), fresh_name('mask', taken)
  ('mask_1', 'mask_2')
  """
  name, number = base, 0
  while name in taken:
    number += 1
    name = f'{base}_{number}'
  taken.add(name)
  return name

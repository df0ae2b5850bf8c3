"""Checks of files from anywhere: damaged bytes, repeated names, and claims larger than the file."""

import errno
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_INFLATION = 1032
"""Bytes that deflate can make of one byte (zlib's technical notes); a larger claim is no data."""


def guarded(read: Callable[[Path], Any], path: Path, expected: str) -> Any:
  """Returns `read(path)`; an error of the format's library becomes one that names the file.

  Args:
    read: reads a file of one format.
    path: the file.
    expected: the format in words, for the message.

  Raises:
    ValueError: the file is damaged or of another format.
    OSError: the file cannot be read.
  """
  try:
    return read(path)
  # damaged bytes raise no closed list of types: BadZipFile, OutOfData, TypeError, struct.error, ...
  except Exception as error:
    # a damaged offset leads to a position that no file has: the system's "invalid argument"
    is_damage = type(error) is OSError and error.errno in (None, errno.EINVAL)
    if isinstance(error, OSError) and not is_damage:
      raise
    if isinstance(error, ValueError) and str(error).startswith(str(path)):
      raise
    # the first sentence: PyTorch's message fills a page, with advice to execute the file's code
    reason = str(error).split('\n')[0].split('. ')[0] or type(error).__name__
    raise ValueError(f'{path}: expected {expected}, found this: {reason}') from error


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
  """Returns the dict of pairs, for parsers that would silently keep one of two values of a name.

  Raises:
    ValueError: a name occurs twice, or is not a string.

  >>> unique([('a', 1), ('b', 2)])
  {'a': 1, 'b': 2}
  """
  values: dict[Any, Any] = {}
  for name, value in pairs:
    if type(name) is not str:
      raise ValueError(f'found {name!r}, expected a string for a name')
    if name in values:
      raise ValueError(f'{name}: found two of this name, expected one')
    values[name] = value
  return values


def dtype_of_numbers(path: Path, name: str, leaf: Any) -> np.dtype:
  """Returns the dtype of an array, or of the metadata of one.

  Raises:
    ValueError: there is no dtype, or it is not one of numbers.
  """
  dtype = np.dtype(getattr(leaf, 'dtype', None) or object)
  if not is_of_numbers(dtype):
    raise ValueError(
      f'{path}: {name}: found {type(leaf).__name__} of dtype {dtype}, expected an array of numbers'
    )
  return dtype


def is_of_numbers(dtype: np.dtype) -> bool:
  """Returns whether arrays of a dtype are of numbers: NumPy's, or those of ml_dtypes."""
  # ml_dtypes are of NumPy's kind V, as are structs
  return dtype.kind in 'biufc' or _is_extended(dtype)


def _is_extended(dtype: np.dtype) -> bool:
  """Returns whether ml_dtypes defines the dtype."""
  return hasattr(ml_dtypes, dtype.name) and np.dtype(getattr(ml_dtypes, dtype.name)) == dtype


def check_zip_members(path: Path, archive: zipfile.ZipFile) -> None:
  """Raises a ValueError if a member occurs twice or claims more bytes than deflate can make.

  The bound matters for other methods of a zip: bzip2 makes a gigabyte of a thousand bytes.
  """
  names: set[str] = set()
  for member in archive.infolist():
    if member.filename in names:
      raise ValueError(f'{path}: {member.filename}: found two members of this name, expected one')
    names.add(member.filename)
    if member.file_size > MAX_INFLATION * member.compress_size:
      raise ValueError(
        f'{path}: {member.filename}: found {member.compress_size} bytes that claim to be '
        f'{member.file_size}, expected at most {MAX_INFLATION} times as many'
      )
  stored = sum(member.compress_size for member in archive.infolist())
  # members may overlap in a file made by hand
  if stored > (size := path.stat().st_size):
    raise ValueError(f'{path}: found members of {stored} bytes in a file of {size}')

"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes beside the place and moves there; a file that was there before stays until then.

  Raises:
    OSError: the folder is missing or read-only, or the disk is full.  Nothing is left behind.
  """
  with replacing(path) as file:
    file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A file to write piece by piece, which takes its place when the context ends without an error.

  Raises:
    OSError: as `write_bytes`.
  """
  temporary = Path(path).parent / f'.opq-{secrets.token_hex(8)}'
  try:
    with open(temporary, 'xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)

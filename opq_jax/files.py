"""Files that appear whole or not at all."""

import os
import secrets
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes beside the place and moves there; a file that was there before stays until then.

  Raises:
    OSError: the folder is missing or read-only, or the disk is full.  Nothing is left behind.
  """
  temporary = Path(path).parent / f'.opq-{secrets.token_hex(8)}'
  try:
    with open(temporary, 'xb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)

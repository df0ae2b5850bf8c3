"""Annotations of arrays for modules that read files: importing jaxtyping takes as long as NumPy.

Type checkers see those of jaxtyping, `Int8[np.ndarray, 'rows columns']`; at run time they are the
array type alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxtyping import Bool, Float32, Float64, Int8, Int16, Int64, Num, Shaped, UInt8, UInt32
else:

  class Annotation:
    """The array type of `Annotation[array type, axes]`."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
      return item[0]

  Bool = Float32 = Float64 = Int8 = Int16 = Int64 = Num = Shaped = UInt8 = UInt32 = Annotation

__all__ = [
  *('Bool', 'Float32', 'Float64', 'Int8', 'Int16', 'Int64', 'Num', 'Shaped', 'UInt8', 'UInt32'),
]

"""The four sizes of a compressed network, as records.

    nominal   the paper's accounting: survivors at fixed widths, without their positions
    packed    plain bit packing: fixed-width codes, a mask, a table of levels
    entropy   the lower bound of a coder that looks at one code at a time
    file      the length of the `.opq` file

All four count the values of escaped weights.  The first three cover the compressed leaves alone;
`file` counts everything, and is the number to quote.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class CompressedLeaf:
  """The four sizes of one compressed leaf of n weights.

  Sizes are in bytes.  A size in bits per weight is `8 * size / weights`; a rate is relative to
  float32, `4 * weights / size`, whatever the dtype of the leaf.

  Attributes:
    path: the leaf's name in the tree.
    shape: its shape.
    dtype: the name of its dtype.
    weights: n.
    survivors: weights whose code is not 0.
    escaped: survivors that are stored as they are, outside the grid.
    levels: quantization levels per sign; of slices, the most.
    dead_channels: output channels in which all weights are pruned.
    dead_rows: indices of the first axis (rows of a table) at which all weights are pruned; 0 for a
      vector.  Of slices, both are sums over them.
    original: bytes of the uncompressed leaf in its own dtype.
    nominal: see `SizeReport`.
    packed: see `SizeReport`.
    entropy: see `SizeReport`.
    file: bytes of its payload in the `.opq` file and of its grid (12 bytes).
    slices: number of its slices, each with a grid and a payload of its own; 0 without slices.
    is_rotated: whether its codes are those of rotated inputs (`opq_jax.coding.rotations`).
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  weights: int
  survivors: int
  escaped: int
  levels: int
  dead_channels: int
  dead_rows: int
  original: int
  nominal: float
  packed: int
  entropy: float
  file: int
  slices: int = 0
  is_rotated: bool = False

  @property
  def sparsity(self) -> float:
    """Share of the weights that are pruned."""
    return 1 - self.survivors / self.weights

  @property
  def nominal_bits(self) -> float:
    """Bits per weight by the paper's accounting."""
    return 8 * self.nominal / self.weights

  @property
  def packed_bits(self) -> float:
    """Bits per weight at fixed widths, with mask and levels."""
    return 8 * self.packed / self.weights

  @property
  def entropy_bits(self) -> float:
    """Zeroth-order entropy of the codes in bits per weight."""
    return 8 * self.entropy / self.weights

  @property
  def file_bits(self) -> float:
    """Bits per weight of this leaf in the file."""
    return 8 * self.file / self.weights


@dataclasses.dataclass(frozen=True)
class UncompressedLeaf:
  """The size of a leaf that the file stores bit for bit.

  Attributes:
    path: the leaf's name in the tree.
    shape: its shape.
    dtype: the name of its dtype.
    original: its bytes.
    file: its share, in proportion to its bytes, of the packed bytes of all uncompressed leaves.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  original: int
  file: int


@dataclasses.dataclass(frozen=True)
class SizeReport:
  """The sizes of a network in bytes, and its compression rates.

  Leaf i has n_i weights, of which e_i are escaped, K_i levels per sign, a threshold, a step and a
  dtype of v_i bits.  Its output channel j has m_ij weights on the grid, whose largest magnitude
  exceeds the threshold by r_ij.  Then:

    nominal   sum_ij m_ij b_ij / 8 + sum_i e_i v_i / 8, with b_ij = 1 + log2(clip(r_ij / step_i, 1,
              127)).  The paper's accounting: no positions, no tables, no headers; compressed leaves
              only.
    packed    for each leaf, (m_i + e_i) codes of w_i bits and a mask of n_i bits, each in whole
              bytes, K_i float32 values and e_i values of v_i bits.  w_i = 1 + ceil(log2 K_i), or
              ceil(log2(2 K_i + 1)) if e_i > 0.  Compressed leaves only.
    entropy   sum_i (n_i H_i + e_i v_i) / 8, with H_i the empirical zeroth-order entropy of the
              codes of leaf i, or their entropy given the subsets if they follow a trellis.  Code 0
              (pruned) and code -128 (escaped) are symbols.  No tables; compressed leaves only.
    file      the length of the `.opq` file: payloads, tables, headers, metadata, the uncompressed
              leaves (biases, BatchNorm), and side files.

  A nominal, packed or entropy rate is 4 n / size, relative to the compressed leaves in float32.
  The file rate is `original / file`, relative to all leaves in their own dtypes.

  Attributes:
    compressed: a row for each compressed leaf, in the order of the tree.
    uncompressed: a row for each other leaf.
    file: bytes of the whole file.
    side_files: those of them that files beside the network take, as config and tokenizer.
  """

  compressed: tuple[CompressedLeaf, ...]
  uncompressed: tuple[UncompressedLeaf, ...]
  file: int
  side_files: int = 0

  @property
  def original(self) -> int:
    """Bytes of the whole tree in its own dtypes, uncompressed leaves included."""
    originals = [leaf.original for leaf in self.compressed]
    return sum(originals) + sum(leaf.original for leaf in self.uncompressed)

  @property
  def as_float32(self) -> int:
    """Bytes of the whole tree with all floating leaves in float32."""
    others = [
      4 * math.prod(leaf.shape) if 'float' in leaf.dtype else leaf.original
      for leaf in self.uncompressed
    ]
    return 4 * self.weights + sum(others)

  @property
  def bits_per_weight(self) -> float:
    """Bits of the compressed leaves in the file per weight of them."""
    return 8 * sum(leaf.file for leaf in self.compressed) / max(self.weights, 1)

  @property
  def weights(self) -> int:
    """Weights in compressed leaves."""
    return sum(leaf.weights for leaf in self.compressed)

  @property
  def survivors(self) -> int:
    """Weights in compressed leaves that are not pruned."""
    return sum(leaf.survivors for leaf in self.compressed)

  @property
  def sparsity(self) -> float:
    """Share of the weights in compressed leaves that are pruned."""
    return 1 - self.survivors / max(self.weights, 1)

  @property
  def escaped(self) -> int:
    """Weights in compressed leaves that are stored as they are."""
    return sum(leaf.escaped for leaf in self.compressed)

  @property
  def dead_channels(self) -> int:
    """Output channels of compressed leaves in which all weights are pruned."""
    return sum(leaf.dead_channels for leaf in self.compressed)

  @property
  def dead_rows(self) -> int:
    """Indices of the first axes of compressed leaves at which all weights are pruned."""
    return sum(leaf.dead_rows for leaf in self.compressed)

  @property
  def dead_leaves(self) -> tuple[str, ...]:
    """Paths of the compressed leaves in which all weights are pruned."""
    return tuple(leaf.path for leaf in self.compressed if leaf.survivors == 0)

  @property
  def nominal(self) -> float:
    """Bytes by the paper's accounting; compressed leaves only."""
    return sum(leaf.nominal for leaf in self.compressed)

  @property
  def packed(self) -> int:
    """Bytes at fixed widths, with masks and levels; compressed leaves only."""
    return sum(leaf.packed for leaf in self.compressed)

  @property
  def entropy(self) -> float:
    """Bytes of the codes at their zeroth-order entropy; compressed leaves only."""
    return sum(leaf.entropy for leaf in self.compressed)

  @property
  def headers(self) -> int:
    """Bytes of the file that belong to no leaf or side file: header, index, metadata."""
    stored = sum(leaf.file for leaf in self.compressed) + self.side_files
    return self.file - stored - sum(leaf.file for leaf in self.uncompressed)

  @property
  def nominal_rate(self) -> float:
    """4 n / nominal: the compression rate that the paper reports."""
    return rate(4 * self.weights, self.nominal)

  @property
  def packed_rate(self) -> float:
    """4 n / packed."""
    return rate(4 * self.weights, self.packed)

  @property
  def entropy_rate(self) -> float:
    """4 n / entropy; slightly above `allocate`'s compression_rate, which counts tables too."""
    return rate(4 * self.weights, self.entropy)

  @property
  def file_rate(self) -> float:
    """original / file: the factor by which the file is smaller than the tree."""
    return rate(self.original, self.file)

  def __str__(self) -> str:
    from opq_jax.report import size_tables

    return f'{size_tables.size_table(self)}\n{size_tables.four_sizes(self)}'


def rate(original: float, size: float) -> float:
  """Returns original / size, infinity for a size of 0."""
  return original / size if size else math.inf

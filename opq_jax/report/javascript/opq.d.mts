/** Values of a leaf, in C order; of float16, bfloat16, float8 and narrower numbers their bits. */
export type Values =
  | Int8Array
  | Int16Array
  | Int32Array
  | BigInt64Array
  | Uint8Array
  | Uint16Array
  | Uint32Array
  | BigUint64Array
  | Float32Array
  | Float64Array;

/** What the index of a file says of a leaf. */
export interface Entry {
  name: string;
  shape: number[];
  /** As NumPy and ml_dtypes name it: 'float32', 'bfloat16', 'float8_e4m3fn', ... */
  dtype: string;
  isCompressed: boolean;
  /** How many leading axes count slices, each with a grid of its own. */
  slices: number;
  /** The earlier leaf that this one is again, or the transpose of. */
  tiedTo: string | null;
}

/** How a compressed leaf is stored. */
export interface Coding {
  /** The order of the axes of the leaf, or of its slices, in the payload; null: their own. */
  axes: number[] | null;
  /** The axis, behind those of slices, whose outputs have scales of their own. */
  scaleAxis: number | null;
  /** The axis, behind those of slices, whose inputs are rotated in the codes. */
  rotatedAxis: number | null;
  /** Of the leaf, or of every slice; scaleBytes: bytes of the scales of its outputs. */
  grids: {threshold: number; first: number; step: number; levels: number; scaleBytes: number}[];
}

/** A decoded leaf. */
export interface Leaf {
  name: string;
  shape: number[];
  dtype: string;
  values: Values;
  /** Of a compressed leaf: -127 to 127, and -128 where a weight is stored as it is. */
  codes?: Int8Array;
}

/** An open file.  Leaves are decoded, and checked, each time they are asked for. */
export interface OpqFile {
  /** The version of the format. */
  readonly version: '1' | '2' | '3';
  /** The path names of all leaves, in the order of the tree. */
  readonly names: readonly string[];
  /** The strings that were saved with the network. */
  readonly metadata: Readonly<Record<string, string>>;
  /** The sizes in bytes of the files that were saved with the network, by name. */
  readonly sideFiles: ReadonlyMap<string, number>;
  /** The bytes of the file that they take together. */
  readonly sideBytes: number;
  /** Returns what the index says of a leaf; decodes nothing. */
  entry(name: string): Entry;
  /** Returns how a compressed leaf is stored, null where it is not compressed; decodes nothing. */
  coding(name: string): Coding | null;
  /** Returns the bytes of the file that each leaf takes, without those of header and index. */
  sizes(): Map<string, number>;
  /** Returns a leaf; throws an Error where the file has no such leaf, or where it is damaged. */
  leaf(name: string): Leaf;
  /** Returns the files that were saved with the network. */
  readSideFiles(): Map<string, Uint8Array>;
  /** Decodes every leaf and every side file; throws an Error where anything is damaged. */
  verify(): void;
}

/**
 * Opens a file: reads and checks its header, grids and index.
 *
 * @param data the bytes of the file, which must not change later
 * @param options.mostBytes bytes that all leaves together may have once they are decoded; by
 *   default 1 GiB, or 1000 times the size of the file where that is more
 * @throws Error where the bytes are no undamaged .opq file of version 1 to 3
 */
export function openOpq(
  data: ArrayBuffer | ArrayBufferView,
  options?: {mostBytes?: number},
): OpqFile;

/**
 * Returns the values of a leaf as numbers of float32: exact for floats of 8 and 16 bits and whole
 * numbers up to 2**24, rounded for wider ones.
 *
 * @throws Error where the dtype is none of floats, whole numbers or bool
 */
export function asFloat32(leaf: Leaf): Float32Array;

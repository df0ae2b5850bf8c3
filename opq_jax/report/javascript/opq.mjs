/**
 * Reads .opq files: compressed neural networks, each in one small file.
 *
 *   import {asFloat32, openOpq} from './opq.mjs';
 *
 *   const file = openOpq(await (await fetch('network.opq')).arrayBuffer());
 *   for (const name of file.names) {
 *     const {shape, dtype, values} = file.leaf(name);
 *   }
 *
 * One module without dependencies.  It follows the specification of the format, versions 1 to 3
 * (docs/format.md of opq_jax), whose terms it uses, and checks what the specification tells a
 * reader to check: whatever bytes it is given, it returns the network that was saved, or throws an
 * Error that names the leaf, what was found and what was expected.  Nothing in a file is executed.
 * Time and memory are bounded by the size of the file and by `mostBytes`.
 */

const VERSIONS = ['1', '2', '3'];
const GRID_BYTES = 12; // of a row of grids: threshold, first value, step
const BLOCK = 2 ** 20; // bytes of uncompressed leaves that are packed together
const MAX_HEADER = 2 ** 12;
const MAX_INDEX = 2 ** 22;
const MAX_NAMES = 2 ** 24; // characters of all path names together
const MAX_DEPTH = 100; // containers within containers
const MAX_AXES = 64;
const MAX_SIDE_BYTES = 2 ** 28;
const MAX_LEVELS = 127;
const LARGEST_FLOAT32 = (2 - 2 ** -23) * 2 ** 127;
const ESCAPE = -128; // the code of an escaped weight
const ADMITTED_BYTES = 2 ** 30; // decoded bytes that a file may claim by default
const ADMITTED_RATIO = 1000; // of its own bytes, where they are more

/**
 * Opens a file: reads and checks its header, grids and index.
 *
 * @param {ArrayBuffer | ArrayBufferView} data the bytes of the file, which must not change later
 * @param {{mostBytes?: number}} options mostBytes: bytes that all leaves together may have once
 *   they are decoded; by default 1 GiB, or 1000 times the size of the file where that is more
 * @returns {OpqFile}
 * @throws {Error} the bytes are no undamaged .opq file of version 1 to 3
 */
export function openOpq(data, {mostBytes} = {}) {
  const bytes = ArrayBuffer.isView(data)
    ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
    : new Uint8Array(data);
  return new OpqFile(bytes, mostBytes ?? Math.max(ADMITTED_BYTES, ADMITTED_RATIO * bytes.length));
}

/**
 * Returns the values of a leaf, whatever its dtype, as numbers of float32.
 *
 * Floats of 8 and 16 bits and whole numbers up to 2**24 are exact; wider ones are rounded.
 *
 * @param {{name: string, dtype: string, values: ArrayBufferView}} leaf of `OpqFile.leaf`
 * @returns {Float32Array}
 * @throws {Error} the dtype is none of floats, whole numbers or bool
 */
export function asFloat32({name, dtype, values}) {
  const kind = DTYPES[dtype];
  if (kind.isOpaque) {
    throw new Error(`${name}: found dtype ${dtype}, expected one of floats or whole numbers`);
  }
  if (dtype === 'float32') return values;
  if (!kind.format) return Float32Array.from(values, Number);
  const table = Float32Array.from({length: 2 ** (8 * kind.bytes)}, (_, bits) =>
    valueOf(bits, kind.format),
  );
  return Float32Array.from(values, (bits) => table[bits]);
}

/** An open file.  Leaves are decoded, and checked, each time they are asked for. */
class OpqFile {
  #bytes;
  #front;
  #lastBlock = {number: -1, data: null};

  constructor(bytes, mostBytes) {
    this.#bytes = bytes;
    this.#front = readFront(bytes, mostBytes);
    /** The version of the format, '1' to '3'. */
    this.version = this.#front.version;
    /** The path names of all leaves, in the order of the tree. */
    this.names = Object.freeze([...this.#front.leaves.keys()]);
    /** The strings that were saved with the network. */
    this.metadata = Object.freeze(this.#front.metadata);
    /** The sizes in bytes of the files that were saved with the network, by name. */
    this.sideFiles = new Map(this.#front.sideFiles?.sizes);
    /** The bytes of the file that they take together. */
    this.sideBytes = this.#front.sideFiles?.packed ?? 0;
  }

  /** Returns what the index says of a leaf; decodes nothing. */
  entry(name) {
    const leaf = this.#entry(name);
    return {
      name,
      shape: [...leaf.shape],
      dtype: leaf.dtype,
      isCompressed: leaf.parts !== null,
      slices: leaf.slices,
      tiedTo: leaf.tiedTo === null ? null : this.names[leaf.tiedTo],
    };
  }

  /**
   * Returns how a compressed leaf is stored, null where it is not compressed; decodes nothing.
   *
   * `grids` has threshold, first value, step and levels of every slice, and the bytes of its scales
   * of outputs.
   */
  coding(name) {
    const leaf = this.#entry(name);
    if (leaf.parts === null) return null;
    const grids = leaf.parts.map(({scaleBytes}, slice) => {
      const {threshold, first, step, levels} = gridOf(name, this.#front, leaf, slice);
      return {threshold, first, step, levels, scaleBytes};
    });
    const {axes, scaleAxis, rotatedAxis} = leaf;
    return {axes: axes && [...axes], scaleAxis, rotatedAxis, grids};
  }

  /**
   * Returns the bytes of the file that each leaf takes, by name, without those of header and index.
   *
   * The packed bytes of all uncompressed leaves are shared out in proportion to their own.
   */
  sizes() {
    const {leaves, blocks, uncompressedSize} = this.#front;
    const packed = BigInt(blocks.reduce((sum, block) => sum + block.size, 0));
    const sizes = new Map();
    let begin = 0;
    for (const [name, leaf] of leaves) {
      if (leaf.tiedTo !== null) {
        sizes.set(name, 0);
      } else if (leaf.parts !== null) {
        sizes.set(name, leaf.stored + GRID_BYTES * leaf.parts.length);
      } else {
        // differences of rounded running sums: their own sum is the packed bytes, to the byte
        const end = (packed * BigInt(leaf.begin + leaf.stored)) / BigInt(uncompressedSize || 1);
        sizes.set(name, Number(end) - begin);
        begin = Number(end);
      }
    }
    return sizes;
  }

  /** Returns a leaf: `{name, shape, dtype, values}`, and `codes` where it is compressed. */
  leaf(name) {
    const leaf = this.#entry(name);
    const found = {name, shape: [...leaf.shape], dtype: leaf.dtype};
    try {
      if (leaf.parts === null) return {...found, values: this.#uncompressed(leaf)};
      return {...found, ...decodeLeaf(this.#bytes, this.#front, leaf)};
    } catch (error) {
      throw new Error(`${name}: ${error.message}`, {cause: error});
    }
  }

  /** Returns the files that were saved with the network: a Map of Uint8Array by name. */
  readSideFiles() {
    const {sideFiles, sideFilesBegin} = this.#front;
    const files = new Map();
    if (sideFiles === null) return files;
    const packed = this.#bytes.subarray(sideFilesBegin, sideFilesBegin + sideFiles.packed);
    checkCrc('side files', crc32(packed), sideFiles.checksum);
    const data = unpack(packed, sideFiles.total, TEXT);
    if (data.length !== sideFiles.total) {
      fail(`side files: found ${data.length} bytes, expected ${sideFiles.total}`);
    }
    let begin = 0;
    for (const [name, size] of sideFiles.sizes) files.set(name, data.slice(begin, (begin += size)));
    return files;
  }

  /** Decodes every leaf and every side file; throws where anything is damaged. */
  verify() {
    for (const name of this.names) this.leaf(name);
    this.readSideFiles();
  }

  #entry(name) {
    const leaf = this.#front.leaves.get(name);
    return leaf ?? fail(`${name}: found no such leaf, expected one of names`);
  }

  #uncompressed(leaf) {
    const data = new Uint8Array(leaf.stored);
    // a leaf may begin and end inside of blocks
    for (let at = 0; at < leaf.stored; ) {
      const number = Math.floor((leaf.begin + at) / BLOCK);
      const start = leaf.begin + at - number * BLOCK;
      const part = this.#block(number).subarray(start, start + leaf.stored - at);
      data.set(part, at);
      at += part.length;
    }
    return new DTYPES[leaf.dtype].array(data.buffer);
  }

  /** An unpacked block; the last one is kept, because the next leaf is likely to lie in it. */
  #block(number) {
    const {blocks, uncompressedSize} = this.#front;
    if (this.#lastBlock.number !== number) {
      const {begin, size, checksum} = blocks[number];
      const packed = this.#bytes.subarray(begin, begin + size);
      checkCrc('block', crc32(packed), checksum);
      const expected = Math.min(BLOCK, uncompressedSize - number * BLOCK);
      const data = unpack(packed, expected, FLOATS);
      if (data.length !== expected) {
        fail(`found a block of ${data.length} bytes, expected ${expected}`);
      }
      this.#lastBlock = {number, data};
    }
    return this.#lastBlock.data;
  }
}

function fail(message) {
  throw new Error(message);
}

function checkCrc(what, found, expected) {
  const text = (crc) => crc.toString(16).padStart(8, '0');
  if (found !== expected) {
    fail(`found CRC-32 ${text(found)} of the ${what}, expected ${text(expected)}`);
  }
}

// ---- dtypes

const integers = (array) => ({bytes: array.BYTES_PER_ELEMENT, array});
const wideFloats = (array) => ({...integers(array), isFloat: true});
/** Leaves of it are never compressed, and come as bits; complex numbers as pairs. */
const opaque = (bytes, array) => ({bytes, array, isOpaque: true});

/**
 * Floats of 8 or 16 bits, which come as bits: bits of the mantissa, exponent of the least normal
 * number, bits of the largest finite number; and whether the sign bit alone is -0, or NaN.
 */
function narrowFloats(array, mantissa, least, largest, hasNegativeZero = true) {
  const signBit = 2 ** (8 * array.BYTES_PER_ELEMENT - 1);
  return {...wideFloats(array), format: {mantissa, least, largest, hasNegativeZero, signBit}};
}

/** Bytes and typed array of every dtype; numbers of fewer than 8 bits take a byte each. */
const DTYPES = {
  bool: integers(Uint8Array),
  int8: integers(Int8Array),
  int16: integers(Int16Array),
  int32: integers(Int32Array),
  int64: integers(BigInt64Array),
  uint8: integers(Uint8Array),
  uint16: integers(Uint16Array),
  uint32: integers(Uint32Array),
  uint64: integers(BigUint64Array),
  float32: wideFloats(Float32Array),
  float64: wideFloats(Float64Array),
  float16: narrowFloats(Uint16Array, 10, -14, 0x7bff),
  bfloat16: narrowFloats(Uint16Array, 7, -126, 0x7f7f),
  float8_e3m4: narrowFloats(Uint8Array, 4, -2, 0x6f),
  float8_e4m3: narrowFloats(Uint8Array, 3, -6, 0x77),
  float8_e4m3b11fnuz: narrowFloats(Uint8Array, 3, -10, 0x7f, false),
  float8_e4m3fn: narrowFloats(Uint8Array, 3, -6, 0x7e),
  float8_e4m3fnuz: narrowFloats(Uint8Array, 3, -7, 0x7f, false),
  float8_e5m2: narrowFloats(Uint8Array, 2, -14, 0x7b),
  float8_e5m2fnuz: narrowFloats(Uint8Array, 2, -15, 0x7f, false),
  float8_e8m0fnu: opaque(1, Uint8Array),
  float6_e2m3fn: opaque(1, Uint8Array),
  float6_e3m2fn: opaque(1, Uint8Array),
  float4_e2m1fn: opaque(1, Uint8Array),
  int1: opaque(1, Uint8Array),
  int2: opaque(1, Uint8Array),
  int4: opaque(1, Uint8Array),
  uint1: opaque(1, Uint8Array),
  uint2: opaque(1, Uint8Array),
  uint4: opaque(1, Uint8Array),
  complex32: opaque(4, Uint16Array),
  bcomplex32: opaque(4, Uint16Array),
  complex64: opaque(8, Float32Array),
  complex128: opaque(16, Float64Array),
};

if (new Uint8Array(new Uint16Array([1]).buffer)[0] !== 1) {
  fail('found a machine of big-endian numbers, expected a little-endian one');
}

/** The value of the bits of a number of 8 or 16 bits. */
function valueOf(bits, format) {
  const {mantissa, least, largest, hasNegativeZero, signBit} = format;
  const magnitude = bits & (signBit - 1);
  const sign = bits & signBit ? -1 : 1;
  if (magnitude > largest) {
    // infinity is the number after the largest one, in formats that have it
    const hasInfinity = magnitude === largest + 1 && (magnitude & (2 ** mantissa - 1)) === 0;
    return hasInfinity ? sign * Infinity : NaN;
  }
  if (magnitude === 0) return sign < 0 ? (hasNegativeZero ? -0 : NaN) : 0;
  const exponent = magnitude >> mantissa;
  const fraction = magnitude & (2 ** mantissa - 1);
  const units = exponent ? fraction + 2 ** mantissa : fraction;
  return sign * units * 2 ** (Math.max(exponent, 1) - 1 + least - mantissa);
}

/** The bits of the number nearest to a positive float32, ties to even; without overflow. */
function bitsOf(value, {mantissa, least}) {
  if (value === 0) return 0;
  FLOAT[0] = value;
  const exponent = Math.max((WORD[0] >>> 23) - 127, least);
  const units = value / 2 ** (exponent - mantissa); // exact: a power of two
  let rounded = Math.floor(units);
  const rest = units - rounded;
  if (rest > 0.5 || (rest === 0.5 && rounded % 2 === 1)) rounded++;
  // a mantissa that rounds up to the next power of two is the next exponent of mantissa 0
  return (exponent - least) * 2 ** mantissa + rounded;
}

const FLOAT = new Float32Array(1);
const WORD = new Uint32Array(FLOAT.buffer);

// ---- CRC-32, as in zlib

const CRC_TABLE = Uint32Array.from({length: 256}, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc;
});

function crc32(bytes, before = 0) {
  let crc = ~before;
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

// ---- LZMA1, raw, with an end mark

/** Parameters of the three kinds of streams; pb is 0 in all of them. */
const INDEX = {lc: 0, lp: 0, window: 2 ** 20};
const FLOATS = {lc: 0, lp: 2, window: 2 ** 20};
const TEXT = {lc: 4, lp: 0, window: 2 ** 23};

const STATES = 12;
// places of the probabilities: six tables of one per state, distances, two tables of lengths,
// literals
const IS_MATCH = 0;
const IS_REPEAT = STATES;
const IS_OTHER = 2 * STATES; // a repeated distance other than the last one
const IS_LONG = 3 * STATES; // the last distance, for more than one byte
const IS_THIRD = 4 * STATES;
const IS_FOURTH = 5 * STATES;
const SLOTS = 6 * STATES;
const SPECIAL = SLOTS + 4 * 64;
const ALIGN = SPECIAL + 128;
const LENGTHS = ALIGN + 16;
const LENGTH_SIZE = 2 + 8 + 8 + 256;
const LITERALS = LENGTHS + 2 * LENGTH_SIZE;

/** Returns the data of a stream, of at most `most` bytes. */
function unpack(data, most, {lc, lp, window}) {
  let at = 5;
  let range = 0xffffffff;
  let code = data.length < 5 || data[0] !== 0 ? fail('found damaged LZMA data') : 0;
  for (let i = 1; i < 5; i++) code = code * 256 + data[i];
  const odds = new Uint16Array(LITERALS + (0x300 << (lc + lp))).fill(1024);

  const normalize = () => {
    if (range >= 0x1000000) return;
    if (at >= data.length) fail('found LZMA data that are cut off');
    range = (range << 8) >>> 0;
    code = ((code << 8) | data[at++]) >>> 0;
  };
  const bit = (place) => {
    const bound = (range >>> 11) * odds[place];
    const isOne = code >= bound;
    if (isOne) {
      code -= bound;
      range -= bound;
      odds[place] -= odds[place] >>> 5;
    } else {
      range = bound;
      odds[place] += (2048 - odds[place]) >>> 5;
    }
    normalize();
    return isOne ? 1 : 0;
  };
  const tree = (place, bits) => {
    let node = 1;
    for (let i = 0; i < bits; i++) node = 2 * node + bit(place + node);
    return node - (1 << bits);
  };
  const reversedTree = (place, bits) => {
    let node = 1;
    let value = 0;
    for (let i = 0; i < bits; i++) {
      const next = bit(place + node);
      node = 2 * node + next;
      value |= next << i;
    }
    return value;
  };
  const evenBits = (count) => {
    let value = 0;
    for (let i = 0; i < count; i++) {
      range >>>= 1;
      const isOne = code >= range;
      if (isOne) code -= range;
      value = 2 * value + (isOne ? 1 : 0);
      normalize();
    }
    return value;
  };
  const length = (place) => {
    if (!bit(place)) return 2 + tree(place + 2, 3);
    if (!bit(place + 1)) return 10 + tree(place + 10, 3);
    return 18 + tree(place + 18, 8);
  };
  const distance = (size) => {
    const slot = tree(SLOTS + 64 * Math.min(size - 2, 3), 6);
    if (slot < 4) return slot;
    const bits = (slot >> 1) - 1;
    const begin = (2 + (slot & 1)) * 2 ** bits;
    if (slot < 14) return begin + reversedTree(SPECIAL + begin - slot, bits);
    return begin + evenBits(bits - 4) * 16 + reversedTree(ALIGN, 4);
  };

  let out = new Uint8Array(Math.min(most, Math.max(4 * data.length, 2 ** 16)));
  let size = 0;
  const room = (count) => {
    if (size + count > most) fail(`found LZMA data that do not end within ${most} bytes`);
    if (size + count <= out.length) return;
    const larger = new Uint8Array(Math.min(most, Math.max(2 * out.length, size + count)));
    larger.set(out);
    out = larger;
  };
  let state = 0;
  let last = [0, 0, 0, 0]; // distances less 1, the last one first
  for (;;) {
    if (!bit(IS_MATCH + state)) {
      room(1);
      const before = size ? out[size - 1] : 0;
      const place = LITERALS + 0x300 * (((size & ((1 << lp) - 1)) << lc) + (before >> (8 - lc)));
      let node = 1;
      if (state >= 7) {
        // after a match: the byte at the last distance predicts, as long as it is right
        let predicted = out[size - last[0] - 1];
        while (node < 0x100) {
          const expected = (predicted >> 7) & 1;
          predicted <<= 1;
          const next = bit(place + ((1 + expected) << 8) + node);
          node = 2 * node + next;
          if (next !== expected) break;
        }
      }
      while (node < 0x100) node = 2 * node + bit(place + node);
      out[size++] = node;
      state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
      continue;
    }
    let count = 1;
    if (!bit(IS_REPEAT + state)) {
      count = length(LENGTHS);
      const own = distance(count);
      if (own === 0xffffffff) break; // the end mark
      last = [own, last[0], last[1], last[2]];
      state = state < 7 ? 7 : 10;
    } else {
      let isShort = false;
      if (!bit(IS_OTHER + state)) {
        isShort = !bit(IS_LONG + state);
      } else if (!bit(IS_THIRD + state)) {
        last = [last[1], last[0], last[2], last[3]];
      } else if (!bit(IS_FOURTH + state)) {
        last = [last[2], last[0], last[1], last[3]];
      } else {
        last = [last[3], last[0], last[1], last[2]];
      }
      if (!isShort) count = length(LENGTHS + LENGTH_SIZE);
      state = state < 7 ? (isShort ? 9 : 8) : 11;
    }
    if (last[0] >= Math.min(size, window)) fail('found damaged LZMA data');
    room(count);
    for (let i = 0, from = size - last[0] - 1; i < count; i++) out[size++] = out[from++];
  }
  if (code !== 0 || at !== data.length) fail('found LZMA data that do not end in their end mark');
  return out.subarray(0, size);
}

// ---- JSON of the index: ASCII; every key once; objects as Map; no fractions, true or false

function parseJson(bytes) {
  if (bytes.some((byte) => byte > 127)) fail('found an index that is not ASCII');
  const text = new TextDecoder().decode(bytes);
  let at = 0;
  const wrong = () => {
    fail(`found ${JSON.stringify(text.slice(at, at + 20))} at ${at} of the index`);
  };
  const skip = () => {
    while (' \t\n\r'.includes(text[at]) && at < text.length) at++;
    return text[at];
  };
  const take = (expected) => (skip() === expected ? at++ : wrong());
  const string = () => {
    const begin = at++;
    while (at < text.length && text[at] !== '"') at += text[at] === '\\' ? 2 : 1;
    at++;
    try {
      return JSON.parse(text.slice(begin, at));
    } catch {
      return fail(`found no string at ${begin} of the index`);
    }
  };
  const items = (end, read) => {
    at++;
    if (skip() === end) return at++;
    for (;;) {
      read();
      if (skip() === end) return at++;
      take(',');
    }
  };
  const value = (depth) => {
    if (depth > MAX_DEPTH + 2) fail(`found a tree deeper than ${MAX_DEPTH} containers`);
    switch (skip()) {
      case '{': {
        const found = new Map();
        items('}', () => {
          if (skip() !== '"') wrong();
          const key = string();
          if (found.has(key)) fail(`found the key ${JSON.stringify(key.slice(0, 80))} twice`);
          take(':');
          found.set(key, value(depth + 1));
        });
        return found;
      }
      case '[': {
        const found = [];
        items(']', () => found.push(value(depth + 1)));
        return found;
      }
      case '"':
        return string();
      case 'n':
        if (text.slice(at, at + 4) !== 'null') wrong();
        at += 4;
        return null;
      default: {
        const number = /-?(?:0|[1-9][0-9]*)(?![0-9.eE])/y;
        number.lastIndex = at;
        const match = number.exec(text) ?? wrong();
        at += match[0].length;
        return Number(match[0]);
      }
    }
  };
  const found = value(0);
  return skip() === undefined ? found : wrong();
}

const isCount = (number) => Number.isSafeInteger(number) && number >= 0;
const isText = (value) => typeof value === 'string';
const hasPairs = (text) => /[\ud800-\udfff]/.test(text);
const codePoints = (text) => Array.from(text, (character) => character.codePointAt(0));
const textLength = (text) => (hasPairs(text) ? codePoints(text).length : text.length);

/** Compares strings by their code points, not by the halves of UTF-16. */
function compareText(one, other) {
  if (!hasPairs(one) && !hasPairs(other)) return one < other ? -1 : Number(one > other);
  const [a, b] = [codePoints(one), codePoints(other)];
  for (let i = 0; i < a.length && i < b.length; i++) if (a[i] !== b[i]) return a[i] - b[i];
  return a.length - b.length;
}

// ---- index

/** Returns {blocks: [size, crc, ...], metadata, leaves: Map of entries, sideFiles or null}. */
function parseIndex(bytes) {
  const content = parseJson(bytes);
  const keys = content instanceof Map ? [...content.keys()].sort().join() : '';
  if (keys !== 'blocks,metadata,tree' && keys !== 'blocks,files,metadata,tree') {
    fail(`found an index of ${keys.slice(0, 80)}, expected blocks, metadata and tree`);
  }
  const numbers = content.get('blocks');
  if (!Array.isArray(numbers) || !numbers.every(isCount) || numbers.length % 2) {
    fail('found blocks that are no pairs of bytes and CRC-32');
  }
  const strings = content.get('metadata');
  if (!(strings instanceof Map) || ![...strings.values()].every(isText)) {
    fail('found metadata that are no strings by name');
  }
  const metadata = Object.create(null);
  for (const [key, text] of strings) metadata[key] = text;
  const sideFiles = content.has('files') ? parseSideFiles(content.get('files')) : null;
  return {blocks: numbers, metadata, leaves: namedLeaves(content.get('tree')), sideFiles};
}

/** Returns the entries of a tree by path name, in the order of the tree. */
function namedLeaves(tree) {
  const leaves = new Map();
  let characters = 0;
  const walk = (node, path, length, depth) => {
    if (depth > MAX_DEPTH) fail(`found a tree deeper than ${MAX_DEPTH} containers`);
    if (node === null) return;
    if (isText(node)) {
      characters += length;
      if (characters > MAX_NAMES) {
        fail(`found path names of more characters than ${MAX_NAMES}`);
      }
      const name = path.join('/');
      if (leaves.has(name)) fail(`${name}: found two leaves of this path`);
      leaves.set(name, parseLeaf(node));
      return;
    }
    let children;
    if (node instanceof Map) {
      children = sortedItems(node);
    } else if (Array.isArray(node) && (node[0] === 'list' || node[0] === 'tuple')) {
      children = node.slice(1).map((child, i) => [String(i), child]);
    } else {
      fail('found a node of the tree that is neither a container nor a leaf');
    }
    for (const [key, child] of children) {
      walk(child, [...path, key], length + 1 + textLength(key), depth + 1);
    }
  };
  walk(tree, [], 0, 0);
  return leaves;
}

/** Returns the items of a dict in the order of its keys: all strings, or all whole numbers. */
function sortedItems(node) {
  const items = [...node].map(([text, child]) => {
    if (!text.startsWith(':')) return {key: text, name: text, child};
    if (text.startsWith('::')) return {key: text.slice(1), name: text.slice(1), child};
    // one notation for each number
    if (!/^:(?:0|-?[1-9][0-9]*)$/.test(text)) fail(`found the key ${JSON.stringify(text)}`);
    return {key: BigInt(text.slice(1)), name: text.slice(1), child};
  });
  if (new Set(items.map(({key}) => typeof key)).size > 1) {
    fail('found keys of one dict that are numbers and strings');
  }
  const compare = (a, b) => {
    if (isText(a.key)) return compareText(a.key, b.key);
    return a.key < b.key ? -1 : 1;
  };
  return items.sort(compare).map(({name, child}) => [name, child]);
}

const NAME =
  /^(?!\.{1,2}(?:\/|$))[^/\\:\x00-\x1f]{1,255}(?:\/(?!\.{1,2}(?:\/|$))[^/\\:\x00-\x1f]{1,255})*$/u;

function parseSideFiles(node) {
  const [packed, checksum, sizes] = Array.isArray(node) && node.length === 3 ? node : [];
  const isWhole = sizes instanceof Map && sizes.size > 0;
  if (!isWhole || ![packed, checksum, ...sizes.values()].every(isCount)) {
    fail('found side files that are no bytes, CRC-32 and sizes by name');
  }
  const names = [...sizes.keys()];
  for (const name of names) {
    if (textLength(name) > 1024 || !NAME.test(name)) {
      fail(`found a side file ${JSON.stringify(name.slice(0, 80))}, expected a relative path`);
    }
  }
  for (let i = 1; i < names.length; i++) {
    if (compareText(names[i - 1], names[i]) >= 0) {
      fail('found side files that are not sorted by name');
    }
  }
  // 'A' and 'a' are one file on some systems; upper case first, which takes letters apart as full
  // case folding does
  const folded = new Set(names.map((name) => name.toUpperCase().toLowerCase()));
  if (folded.size < names.length) fail('found names of side files that differ in case alone');
  for (const name of folded) {
    for (let at = name.indexOf('/'); at >= 0; at = name.indexOf('/', at + 1)) {
      if (folded.has(name.slice(0, at))) fail('found a side file that is a folder too');
    }
  }
  let total = 0;
  for (const size of sizes.values()) total += size;
  if (total > MAX_SIDE_BYTES) fail(`found side files of ${total} bytes`);
  return {packed, checksum, sizes, total};
}

const LEAF = /^(\w+)\[([\d,]*)\](?: ([\d,]+) ([\d,]+))?((?: [a-z_]+=[^ ]+)*)$/;
const LIST = /^\d{1,18}(?:,\d{1,18})*$/;
const FIELDS = ['axes', 'escapes', 'rotated', 'same', 'scales', 'slices', 'transposed'];

/** Returns the entry of a leaf: what its notation says; its place comes later. */
function parseLeaf(text) {
  const wrong = (expected) => fail(`found leaf ${JSON.stringify(text.slice(0, 80))}, ${expected}`);
  const numbers = (list) => {
    if (!LIST.test(list)) wrong('expected numbers of 1 to 18 digits');
    return list.split(',').map(Number);
  };
  const match = LEAF.exec(text) ?? wrong('expected dtype and shape, or levels and bytes too');
  const [, dtype, listed, levels, stored, rest] = match;
  const kind = Object.hasOwn(DTYPES, dtype) ? DTYPES[dtype] : wrong('expected a known dtype');
  const shape = listed ? numbers(listed) : [];
  const positive = shape.reduce((product, n) => product * BigInt(Math.max(n, 1)), 1n);
  if (shape.length > MAX_AXES || positive * BigInt(kind.bytes) >= 1n << 62n) {
    wrong('expected a shape that an array can have');
  }
  const fields = parseFields(rest);
  const ties = ['same', 'transposed'].filter((name) => fields.has(name));
  const entry = {
    dtype,
    shape,
    stored: 0, // bytes of all payloads, or of the leaf
    // of a compressed leaf: {levels, stored, escapes, escapeBytes, scaleBytes} of each slice
    parts: null,
    slices: 0,
    axes: null,
    scaleAxis: null, // the axis of outputs with scales, behind those of slices
    rotatedAxis: null, // the axis of rotated inputs, likewise
    begin: 0, // in the tensor codes, or in the unpacked bytes of uncompressed leaves
    tiedTo: null,
    isTransposed: false,
    grids: null, // of a compressed leaf: the first of its rows
  };
  if (levels === undefined) {
    if (fields.size > ties.length || ties.length > 1) {
      wrong('expected no field of compressed leaves');
    }
    if (ties.length) {
      if (!/^\d{1,18}$/.test(fields.get(ties[0]))) wrong(`expected ${ties[0]}=NUMBER`);
      const tiedTo = Number(fields.get(ties[0]));
      return {...entry, tiedTo, isTransposed: ties[0] === 'transposed'};
    }
    return {...entry, stored: product(shape) * kind.bytes};
  }
  if (ties.length) wrong('expected no payload of a leaf that is another one again');
  if (!kind.isFloat) wrong('expected floats of whole bytes');
  let slices = 0;
  if (fields.has('slices')) {
    slices = /^[1-9]\d?$/.test(fields.get('slices')) ? Number(fields.get('slices')) : shape.length;
    if (slices >= shape.length) wrong('expected slices=N of 1 or more, and fewer than its axes');
  }
  const count = product(shape.slice(0, slices));
  const own = shape.slice(slices);
  const [allLevels, sizes] = [numbers(levels), numbers(stored)];
  if (allLevels.length !== count || sizes.length !== count) {
    wrong(`expected ${count} numbers of levels and of bytes`);
  }
  if (Math.max(...chunked(allLevels)) > MAX_LEVELS) wrong(`expected at most ${MAX_LEVELS} levels`);
  let escapes = null;
  if (fields.has('escapes')) {
    escapes = numbers(fields.get('escapes'));
    const isPossible = (_, i) => {
      const [weights, bytes] = [escapes[2 * i], escapes[2 * i + 1]];
      return weights <= product(own) && bytes <= sizes[i] && (weights > 0) === (bytes > 0);
    };
    if (escapes.length !== 2 * count || !escapes.some(Boolean) || !sizes.every(isPossible)) {
      wrong('expected escapes=COUNT,BYTES that it can have');
    }
  }
  let axes = null;
  if (fields.has('axes')) {
    axes = numbers(fields.get('axes'));
    const sorted = [...axes].sort((a, b) => a - b);
    const isOrder = axes.length === own.length && sorted.every((axis, i) => axis === i);
    if (!isOrder || sorted.join() === axes.join() || axes.join() !== fields.get('axes')) {
      wrong('expected axes= with another order of its axes');
    }
  }
  let rotatedAxis = null;
  if (fields.has('rotated')) {
    const listed = numbers(fields.get('rotated'));
    rotatedAxis = listed[0];
    const isWhole = listed.length === 1 && String(rotatedAxis) === fields.get('rotated');
    if (!isWhole || rotatedAxis >= own.length) wrong('expected rotated=AXIS that it can have');
  }
  const [scaleAxis, ...scaleSizes] = fields.has('scales') ? numbers(fields.get('scales')) : [null];
  const parts = sizes.map((size, i) => ({
    levels: allLevels[i],
    stored: size,
    escapes: escapes ? escapes[2 * i] : 0,
    escapeBytes: escapes ? escapes[2 * i + 1] : 0,
    scaleBytes: scaleSizes[i] ?? 0,
  }));
  const fits = ({stored, escapeBytes, scaleBytes}) =>
    scaleBytes > 0 && scaleBytes <= stored - escapeBytes;
  const hasScales = scaleAxis !== null;
  if (hasScales && !(scaleAxis < own.length && scaleSizes.length === count && parts.every(fits))) {
    wrong('expected scales=AXIS,BYTES that it can have');
  }
  const total = sizes.reduce((sum, size) => sum + size, 0);
  return {...entry, stored: total, parts, slices, axes, scaleAxis, rotatedAxis};
}

const product = (numbers) => numbers.reduce((sum, n) => sum * n, 1);

/** The largest numbers of pieces of a list: a call takes some ten thousand arguments at most. */
function chunked(numbers) {
  const most = [];
  for (let i = 0; i < numbers.length; i += 1024) most.push(Math.max(...numbers.slice(i, i + 1024)));
  return most;
}

function parseFields(text) {
  const fields = new Map();
  let before = '';
  for (const field of text.split(' ').slice(1)) {
    const name = field.slice(0, field.indexOf('='));
    // a field says what bytes mean: weights read without it would be wrong ones
    if (!FIELDS.includes(name)) fail(`found field ${name}, expected one of ${FIELDS.join(', ')}`);
    if (name <= before) fail(`found field ${name} after ${before}, expected names in order, once`);
    fields.set(name, field.slice(name.length + 1));
    before = name;
  }
  return fields;
}

// ---- front: header, grids, index, and the places of all parts

function readFront(bytes, mostBytes) {
  const header = readHeader(bytes);
  const [rows, indexSize, codesSize, blocksSize, sideSize = null] = header.sizes;
  const gridsEnd = header.end + GRID_BYTES * rows;
  const codesBegin = gridsEnd + indexSize;
  checkCrc('index', crc32(bytes.subarray(header.end, codesBegin)), header.checksum);
  const packed = bytes.subarray(gridsEnd, codesBegin);
  const index = parseIndex(unpack(packed, MAX_INDEX, INDEX));
  const placed = placeLeaves(index.leaves);
  const blocks = [];
  let begin = codesBegin + codesSize;
  for (let i = 0; i < index.blocks.length; i += 2) {
    blocks.push({begin, size: index.blocks[i], checksum: index.blocks[i + 1]});
    begin += index.blocks[i];
  }
  // the tree implies all sizes that the header states: nothing in a file is left over
  for (const [what, found, expected] of [
    ['rows of grids', placed.rows, rows],
    ['bytes of codes', placed.codesSize, codesSize],
    ['blocks', blocks.length, Math.ceil(placed.uncompressedSize / BLOCK)],
    ['bytes of blocks', begin - codesBegin - codesSize, blocksSize],
    ['bytes of side files', index.sideFiles?.packed ?? null, sideSize],
  ]) {
    if (found !== expected) fail(`found an index of ${found} ${what}, expected ${expected}`);
  }
  let claimed = 0n;
  for (const {shape, dtype} of index.leaves.values()) {
    claimed += shape.reduce((size, n) => size * BigInt(n), BigInt(DTYPES[dtype].bytes));
  }
  if (Number(claimed) > mostBytes) {
    fail(`found leaves of ${claimed} bytes, expected at most ${mostBytes}; mostBytes admits more`);
  }
  const grids = new Float32Array(bytes.slice(header.end, gridsEnd).buffer);
  const front = {
    version: header.version,
    leaves: index.leaves,
    metadata: index.metadata,
    grids,
    codesBegin,
    blocks,
    uncompressedSize: placed.uncompressedSize,
    sideFiles: index.sideFiles,
    sideFilesBegin: begin,
  };
  for (const [name, leaf] of index.leaves) {
    const hasEscapes = leaf.parts?.some((part) => part.escapes) ?? false;
    const hasOrder = leaf.slices > 0 || leaf.axes !== null;
    const hasAxis = leaf.scaleAxis !== null || leaf.rotatedAxis !== null;
    const hasFields = leaf.tiedTo !== null || hasOrder || hasAxis || hasEscapes;
    if (front.version === '1' && hasFields) {
      fail(`${name}: found a field, expected none in version 1`);
    }
    // those of slices are checked when the leaf is decoded: a leaf may have a million
    if (leaf.parts !== null && leaf.slices === 0) gridOf(name, front, leaf, 0);
  }
  return front;
}

/** Parses the header, of which there is exactly one for given sizes, version and checksum. */
function readHeader(bytes) {
  const start = new TextDecoder().decode(bytes.subarray(0, 8 + MAX_HEADER));
  let content;
  try {
    const length = Number(new DataView(bytes.slice(0, 8).buffer).getBigUint64(0, true));
    const text = bytes.subarray(8, 8 + Math.min(length, MAX_HEADER));
    content = JSON.parse(new TextDecoder().decode(text));
  } catch {
    fail(`found no .opq file: it begins with ${JSON.stringify(start.slice(0, 20))}`);
  }
  const about = content?.__metadata__;
  if (about?.format !== 'opq') fail('found no .opq file, expected the format opq');
  const {version} = about;
  if (!VERSIONS.includes(version)) fail(`found version ${version}, expected one of ${VERSIONS}`);
  const names = ['grids', 'index', 'codes', 'uncompressed'];
  if (version === '3') names.push('files');
  const sizes = names.map((name) => content[name]?.shape?.[0]);
  const isChecksum = isText(about.crc32) && /^[0-9a-f]{8}$/.test(about.crc32);
  if (!sizes.every(isCount) || !isChecksum) fail('found a damaged header');
  const checksum = parseInt(about.crc32, 16);
  const expected = headerOf(names, sizes, about.crc32, version);
  // JSON of other spacing, order or repeated keys, which readers understand differently
  for (let i = 0; i < expected.length; i++) {
    if (bytes[i] !== expected[i]) fail('found another header than the one of its own sizes');
  }
  const size = expected.length + GRID_BYTES * sizes[0] + sizes.slice(1).reduce((a, b) => a + b, 0);
  if (bytes.length !== size) fail(`found ${bytes.length} bytes, expected ${size}`);
  return {version, sizes, checksum, end: expected.length};
}

function headerOf(names, sizes, crc, version) {
  const content = {__metadata__: {format: 'opq', version, crc32: crc}};
  let begin = 0;
  names.forEach((name, i) => {
    const isGrids = name === 'grids';
    const end = begin + sizes[i] * (isGrids ? GRID_BYTES : 1);
    content[name] = {
      dtype: isGrids ? 'F32' : 'U8',
      shape: isGrids ? [sizes[i], 3] : [sizes[i]],
      data_offsets: [begin, end],
    };
    begin = end;
  });
  const text = JSON.stringify(content);
  const padded = text.padEnd(8 * Math.ceil(text.length / 8));
  const bytes = new Uint8Array(8 + padded.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(padded.length), true);
  bytes.set(new TextEncoder().encode(padded), 8);
  return bytes;
}

/** Places the leaves end to end, uncompressed ones at multiples of their item size. */
function placeLeaves(leaves) {
  let [rows, codesSize, uncompressedSize] = [0, 0, 0];
  const entries = [...leaves.values()];
  [...leaves].forEach(([name, leaf], number) => {
    if (leaf.tiedTo !== null) {
      tie(name, leaf, leaf.tiedTo < number ? entries[leaf.tiedTo] : null);
    } else if (leaf.parts === null) {
      const {bytes} = DTYPES[leaf.dtype];
      leaf.begin = Math.ceil(uncompressedSize / bytes) * bytes;
      uncompressedSize = leaf.begin + leaf.stored;
    } else {
      [leaf.begin, leaf.grids] = [codesSize, rows];
      codesSize += leaf.stored;
      rows += leaf.parts.length;
    }
  });
  return {rows, codesSize, uncompressedSize};
}

/** Gives a leaf that is an earlier one again the parts and the place of that one. */
function tie(name, leaf, first) {
  const shape = leaf.isTransposed ? [...leaf.shape].reverse() : leaf.shape;
  if (first === null || first.tiedTo !== null || first.shape.join() !== shape.join()) {
    fail(`${name}: found number ${leaf.tiedTo}, expected an earlier leaf of shape [${shape}]`);
  }
  if (leaf.isTransposed && (shape.length !== 2 || first.slices || first.parts === null)) {
    fail(`${name}: found transposed, expected it of a compressed leaf of two axes without slices`);
  }
  if (first.dtype !== leaf.dtype) {
    fail(`${name}: found dtype ${leaf.dtype}, expected ${first.dtype}, of the leaf it is`);
  }
  const {stored, parts, slices, begin, grids, axes, scaleAxis, rotatedAxis} = first;
  Object.assign(leaf, {stored, parts, slices, begin, grids, axes, scaleAxis, rotatedAxis});
  if (leaf.isTransposed) {
    leaf.axes = axes ? null : [1, 0];
    leaf.scaleAxis = scaleAxis === null ? null : 1 - scaleAxis;
    leaf.rotatedAxis = rotatedAxis === null ? null : 1 - rotatedAxis;
  }
}

// ---- grids: from codes to values

/** Returns the grid of a slice: its threshold, step and levels, and the value of every level. */
function gridOf(name, front, leaf, slice) {
  const {levels} = leaf.parts[slice];
  const row = 3 * (leaf.grids + slice);
  return checkedGrid(name, front.grids.subarray(row, row + 3), levels, front.version);
}

function checkedGrid(name, [threshold, first, step], levels, version) {
  const values = new Float32Array(Math.max(levels, 1));
  let [isExact, rounds, isRising] = [true, false, true];
  for (let k = 0; k < values.length; k++) {
    const exact = step * k; // 24 bits times 7: exact in float64
    values[k] = first + Math.fround(exact);
    isExact &&= Math.fround(exact) === exact;
    rounds ||= values[k] !== first + exact;
    isRising &&= k === 0 || values[k] > values[k - 1];
  }
  const areFinite = [threshold, step, values[values.length - 1]].every(Number.isFinite);
  const isPositive = threshold >= 0 && first >= 0 && step > 0;
  const found = `found a grid of ${threshold}, ${first}, ${step} and ${levels} levels`;
  if (!areFinite || !isPositive || !isExact || !isRising) {
    fail(`${name}: ${found}, expected finite numbers, a positive step, and values that rise`);
  }
  if (rounds && version === '1') {
    fail(`${name}: ${found}, expected values that float32 holds exactly in version 1`);
  }
  return {threshold, first, step, levels, values, inverse: Math.fround(1 / step)};
}

/** Returns the integer of the scale of each output. */
function decodeScales(data, outputs) {
  const codes = decodeCodes(data, [outputs]);
  if (codes.includes(ESCAPE)) fail(`found a code of an output scale of ${ESCAPE}`);
  return codes;
}

/** Returns the grid of an output, given the integer of its scale. */
function scaledGrid({threshold, first, step, levels}, code) {
  const octave = Math.floor(code / 8);
  const scale = (1 + (code - 8 * octave) / 8) * 2 ** octave;
  const numbers = [threshold, first, step].map((number) => scale * number);
  if (numbers.some((number) => Math.fround(number) !== number)) {
    fail('found a grid whose products with output scales round, expected numbers of 20 bits');
  }
  return checkedGrid('grid', numbers, levels, VERSIONS[VERSIONS.length - 1]);
}

/** The cell of a magnitude, without bounds; each operation rounds to float32. */
function cellOf(magnitude, {threshold, inverse}) {
  return Math.floor(Math.fround(Math.fround(magnitude - threshold) * inverse));
}

/** Returns the value of every code, at the place of its byte: in the dtype, and as a number. */
function valueTable(grid, kind) {
  const table = new kind.array(256);
  const numbers = new Float32Array(256);
  const last = Math.max(grid.levels - 1, 0);
  for (let level = 1; level <= grid.levels; level++) {
    const value = grid.values[level - 1];
    if (!kind.format) {
      numbers[level] = table[level] = value;
      numbers[256 - level] = table[256 - level] = -value;
      continue;
    }
    const {format} = kind;
    const [cell, largest] = [level - 1, valueOf(format.largest, format)];
    // at most the largest number, since infinity lies in no cell
    let bits = bitsOf(Math.min(value, largest), format);
    const own = cellOf(valueOf(bits, format), grid);
    if (own < cell) bits = Math.min(bits + 1, format.largest);
    else if (own > cell && cell < last) bits = Math.max(bits, 1) - 1;
    table[level] = bits;
    table[256 - level] = bits || format.hasNegativeZero ? bits | format.signBit : 0;
    numbers[level] = valueOf(bits, format);
    numbers[256 - level] = -numbers[level];
  }
  return {table, numbers};
}

/** Checks the codes that occur: each on the grid, with a value in its own cell. */
function checkCells(counts, numbers, grid) {
  for (let code = -127; code <= 127; code++) {
    if (code === 0 || counts[code & 255] === 0) continue;
    if (Math.abs(code) > grid.levels) fail(`found code ${code}, expected at most ${grid.levels}`);
    const value = numbers[code & 255];
    const magnitude = Math.abs(value);
    if (!Number.isFinite(value)) fail('found values that are NaN or infinite, expected none');
    if (value !== 0 && magnitude < 2 ** -126) fail('found values below 2**-126, expected none');
    const cell = Math.min(Math.max(cellOf(magnitude, grid), 0), Math.max(grid.levels - 1, 0));
    if ((value < 0 ? -1 : 1) * (1 + cell) !== code) {
      fail('found values that lie in another cell, expected none');
    }
  }
}

// ---- leaves

/** Returns the values and the codes of a compressed leaf, slice by slice. */
function decodeLeaf(bytes, front, leaf) {
  const kind = DTYPES[leaf.dtype];
  // what the codes of a rotated leaf stand for
  const codedKind = leaf.rotatedAxis === null ? kind : DTYPES.float32;
  const own = leaf.shape.slice(leaf.slices);
  const coded = leaf.axes ? leaf.axes.map((axis) => own[axis]) : own;
  const size = product(own);
  // the shape is only a claim, which payloads bound before memory is taken for it
  const parts = leaf.parts.map((part, slice) => ({part, grid: gridOf('grid', front, leaf, slice)}));
  let begin = front.codesBegin + leaf.begin;
  let [values, codes] = [null, null];
  parts.forEach(({part, grid}, slice) => {
    const data = bytes.subarray(begin, (begin += part.stored));
    const axis = leaf.axes ? leaf.axes.indexOf(leaf.scaleAxis) : leaf.scaleAxis;
    const found = decodeSlice(data, coded, part, grid, codedKind, axis);
    if (leaf.axes) {
      found.values = transposed(found.values, coded, leaf.axes);
      found.codes = transposed(found.codes, coded, leaf.axes);
    }
    if (leaf.rotatedAxis !== null) {
      found.values = inDtype(restored(found.values, own, leaf.rotatedAxis), kind);
    }
    if (leaf.slices === 0) {
      ({values, codes} = found);
      return;
    }
    values ??= new kind.array(size * parts.length);
    codes ??= new Int8Array(size * parts.length);
    values.set(found.values, slice * size);
    codes.set(found.codes, slice * size);
  });
  return {values, codes};
}

function decodeSlice(data, shape, part, grid, kind, axis) {
  const [begin, end] = [part.scaleBytes, part.stored - part.escapeBytes];
  const codes = decodeCodes(data.subarray(begin, end), shape);
  if (codes.includes(ESCAPE)) fail(`found code ${ESCAPE}, expected at most ${grid.levels}`);
  const values = new kind.array(codes.length);
  const scales = begin ? decodeScales(data.subarray(0, begin), shape[axis]) : [0];
  const grids = new Map(); // by the integer of the scale; without scales, of 0: the grid itself
  for (const scale of scales) {
    if (grids.has(scale)) continue;
    const own = begin ? scaledGrid(grid, scale) : grid;
    grids.set(scale, {own, ...valueTable(own, kind), counts: new Uint32Array(256)});
  }
  const ofOutput = Array.from(scales, (scale) => grids.get(scale));
  const inside = begin ? product(shape.slice(axis + 1)) : codes.length;
  for (let i = 0, output = 0; i < codes.length; output = (output + 1) % ofOutput.length) {
    const {table, counts} = ofOutput[output];
    for (const stop = i + inside; i < stop; i++) {
      const code = codes[i] & 255;
      values[i] = table[code];
      counts[code]++;
    }
  }
  for (const {own, numbers, counts} of grids.values()) checkCells(counts, numbers, own);
  if (part.escapes) {
    const escaped = decodeEscapes(data.subarray(end), codes.length, part.escapes, kind);
    // by their bytes: a typed array of floats may change the bits of NaN
    const [to, from] = [new Uint8Array(values.buffer), escaped.values];
    escaped.positions.forEach((position, i) => {
      if (codes[position] !== 0) fail('found an escaped weight that has a code as well');
      codes[position] = ESCAPE;
      for (let j = 0; j < kind.bytes; j++) {
        to[position * kind.bytes + j] = from[i * kind.bytes + j];
      }
    });
  }
  return {values, codes};
}

// ---- rotations

/** Returns weights of float32, of their values with the inputs along an axis rotated. */
function restored(values, shape, axis) {
  const inputs = shape[axis];
  let largest = 0;
  for (const value of values) largest = Math.max(largest, Math.abs(value));
  if (!(largest * inputs ** 2 <= LARGEST_FLOAT32)) {
    fail(`found rotated weights of ${largest} over ${inputs} inputs, expected sums of float32`);
  }
  let size = 1;
  while (2 * size <= inputs) size *= 2;
  const inside = product(shape.slice(axis + 1));
  const result = Float32Array.from(values);
  for (let begin = 0; begin < result.length; begin += inputs * inside) {
    const rows = result.subarray(begin, begin + inputs * inside);
    if (size < inputs) {
      hadamard(rows.subarray((inputs - size) * inside), size, inside);
      flip(rows, inputs, inside, inputs);
    }
    hadamard(rows, size, inside);
    flip(rows, inputs, inside, 0);
  }
  return result;
}

/** Multiplies the first rows by the Hadamard matrix of their number, in place, in float32. */
function hadamard(rows, size, inside) {
  for (let half = 1; half < size; half *= 2) {
    const distance = half * inside;
    for (let start = 0; start < size * inside; start += 2 * distance) {
      for (let i = start; i < start + distance; i++) {
        const [first, second] = [rows[i], rows[i + distance]];
        rows[i] = first + second; // a sum of two float32, rounded once
        rows[i + distance] = first - second;
      }
    }
  }
  const factor = Math.fround(1 / Math.sqrt(size));
  for (let i = 0; i < size * inside; i++) rows[i] *= factor;
}

/** Changes the sign of the rows whose sign, counted from `start`, is minus. */
function flip(rows, inputs, inside, start) {
  for (let row = 0; row < inputs; row++) {
    let hash = (start + row + 1) | 0;
    hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
    hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
    if ((hash ^ (hash >>> 16)) >= 0) continue;
    for (let i = row * inside; i < (row + 1) * inside; i++) rows[i] = -rows[i];
  }
}

/** Returns finite numbers of float32 as the nearest ones of a dtype. */
function inDtype(numbers, kind) {
  if (!kind.format) return kind.array === Float32Array ? numbers : kind.array.from(numbers);
  const {format} = kind;
  const largest = valueOf(format.largest, format);
  return kind.array.from(numbers, (number) => {
    const bits = bitsOf(Math.min(Math.abs(number), largest), format);
    const isNegative = number < 0 || Object.is(number, -0);
    return isNegative && (bits || format.hasNegativeZero) ? bits | format.signBit : bits;
  });
}

/** Returns the array that, with its axes in the order `axes`, is `array` of shape `shape`. */
function transposed(array, shape, axes) {
  const strides = new Array(shape.length); // of the result, by the axes of `array`
  let stride = 1;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    const place = axes.indexOf(axis);
    strides[place] = stride;
    stride *= shape[place];
  }
  const result = new array.constructor(array.length);
  const last = shape.length - 1;
  const index = new Array(shape.length).fill(0);
  for (let at = 0, to = 0; at < array.length; ) {
    for (let i = 0, place = to; i < shape[last]; i++, place += strides[last]) {
      result[place] = array[at++];
    }
    for (let axis = last - 1; axis >= 0; axis--) {
      to += strides[axis];
      if (++index[axis] < shape[axis]) break;
      to -= strides[axis] * shape[axis];
      index[axis] = 0;
    }
  }
  return result;
}

// ---- payloads: bits, tables, words

/** Bits of bytes, the highest of each byte first. */
class Bits {
  constructor(data, most) {
    this.data = data;
    this.size = 8 * Math.min(data.length, most);
    this.at = 0;
  }

  take(count) {
    if (this.at + count > this.size) fail('found bits that are cut off or damaged');
    let value = 0;
    for (let i = 0; i < count; i++, this.at++) {
      value = 2 * value + ((this.data[this.at >> 3] >> (7 - (this.at & 7))) & 1);
    }
    return value;
  }

  /** An exponential Golomb code; numbers up to 2**17. */
  golomb(order) {
    let zeros = 0;
    while (this.take(1) === 0) {
      if (++zeros > 16) fail('found bits that are cut off or damaged');
    }
    const number = 2 ** (zeros + order) + this.take(zeros + order) - 2 ** order;
    return number <= 2 ** 17 ? number : fail(`found ${number} in a table, expected 2**17 at most`);
  }

  /** The number of the first byte after the bits, padded with zeros. */
  end() {
    if (this.at % 8 && this.take(8 - (this.at % 8)) !== 0) {
      fail('found bits that are not padded with zeros');
    }
    return this.at / 8;
  }
}

/** Returns precision, and frequencies, of the symbols that occur, and bits of the cheapest one. */
function readTable(bits) {
  const precision = bits.take(4) + 1;
  const [largest, minusLeast] = [bits.golomb(2), bits.golomb(2)];
  if (largest > 127 || minusLeast > 128) fail(`found symbols ${-minusLeast} to ${largest}`);
  const all = [];
  for (let s = 1; s <= Math.max(largest, minusLeast); s++) {
    if (s <= largest) all.push(s);
    if (s <= minusLeast) all.push(-s);
  }
  const symbols = [0];
  const frequencies = [0];
  let rest = 2 ** precision;
  let before = rest >> 3;
  for (const symbol of all) {
    before = bits.golomb(Math.max(0, bitLength(before) - 2));
    rest -= before;
    if (before === 0) continue;
    symbols.push(symbol);
    frequencies.push(before);
  }
  frequencies[0] = rest;
  if (rest === 0) [symbols.shift(), frequencies.shift()];
  if (rest < 0 || symbols.length < 2) {
    fail(`found frequencies ${frequencies.slice(0, 20)}, expected two of ${2 ** precision}`);
  }
  const cheapest = precision - Math.log2(Math.max(...frequencies));
  return {precision, symbols: Int8Array.from(symbols), frequencies, cheapest};
}

const bitLength = (number) => 32 - Math.clz32(number);

const PLACES = 10; // bits of a slot by which the search for its symbol begins

/** Returns the shares of the symbols of a table in 2**bits slots, and where to look for a slot. */
function sharesOf({precision, symbols, frequencies}, bits) {
  const count = symbols.length;
  const left = new Uint32Array(count + 1);
  let sum = 0;
  for (let s = 0; s < count; s++) {
    // of 24 bits, every symbol has one slot, and the others by its frequency
    left[s] = bits === 24 ? Math.floor((sum * (2 ** 24 - count)) / 2 ** precision) + s : sum;
    sum += frequencies[s];
  }
  left[count] = 2 ** bits;
  const shift = Math.max(bits - PLACES, 0);
  const places = new Uint8Array(2 ** (bits - shift));
  for (let place = 0, s = 0; place < places.length; place++) {
    while (left[s + 1] <= place * 2 ** shift) s++;
    places[place] = s;
  }
  // powers of two, which are slow to compute for every symbol
  return {bits, slots: 2 ** bits, above: 2 ** (32 - bits), shift, symbols, left, places};
}

/**
 * An asymmetric numeral system: a head of 64 bits, as two halves, above a stack of words.
 *
 * Products of 64 bits are sums of doubles below 2**53.
 */
class Coder {
  constructor(data, size, cheapest) {
    if (data.length < 4 || data[data.length - 1] === 0) {
      fail(`found ${data.length} bytes of ANS words that no encoder ends in this way`);
    }
    const count = Math.ceil(data.length / 4);
    // integers of the coder may take up to 1 % and a few bits less than the ideal length
    const most = Math.floor((32 * count * 1.01 + 64) / cheapest);
    if (size > most) fail(`found codes for at most ${most} weights, expected ${size}`);
    this.words = new Uint32Array(count);
    new Uint8Array(this.words.buffer).set(data);
    this.left = count;
    this.low = 0;
    this.high = 0;
    for (let i = 0; i < 2 && this.left; i++) {
      this.high = this.low;
      this.low = this.words[--this.left];
    }
  }

  /** Takes symbols of one model, of 24 bits, off the words. */
  take({shift, symbols, left: bounds, places}, out, begin, end) {
    let {words, left, low, high} = this;
    for (let i = begin; i < end; i++) {
      const slot = low & 0xffffff;
      let s = places[slot >>> shift];
      while (bounds[s + 1] <= slot) s++;
      const share = bounds[s + 1] - bounds[s];
      // (head >> 24) * share + slot - bound: the upper 16 bits of the head apart
      const upper = (high >>> 16) * share;
      const lower = ((high & 0xffff) * 256 + (low >>> 24)) * share + (slot - bounds[s]);
      const sum = lower + (upper & 255) * 0x1000000;
      low = sum >>> 0;
      high = (upper - (upper & 255)) / 256 + (sum - low) / 0x100000000;
      if (high === 0 && left > 0) {
        high = low;
        low = words[--left];
      }
      out[i] = symbols[s];
    }
    Object.assign(this, {left, low, high});
  }

  /** Takes indices along the trellis off the words; returns the state after them. */
  takeAlongTrellis(models, ranges, state, indices, subsets) {
    let {words, left, low, high} = this;
    for (let i = 0; i < ranges.length; i++) {
      const subset = SUBSET_OF[state];
      const {bits, slots, above, shift, symbols, left: bounds, places} =
        models[2 * ranges[i] + subset];
      const slot = low & (slots - 1);
      let s = places[slot >>> shift];
      while (bounds[s + 1] <= slot) s++;
      const share = bounds[s + 1] - bounds[s];
      // (head >> bits) * share + slot - bound
      const upper = high * share;
      const rest = upper & (slots - 1);
      const sum = (low >>> bits) * share + (slot - bounds[s]) + rest * above;
      low = sum >>> 0;
      high = (upper - rest) / slots + (sum - low) / 0x100000000;
      if (high === 0 && left > 0) {
        high = low;
        low = words[--left];
      }
      indices[i] = symbols[s];
      subsets[i] = subset;
      state = NEXT[2 * state + (symbols[s] & 1)];
    }
    Object.assign(this, {left, low, high});
    return state;
  }

  /** Checks that nothing but the checksum of head and codes is left. */
  checkEnd(codes, head) {
    const expected = (crc32(codes, crc32(head)) | 0x80000000) >>> 0;
    if (this.left !== 0 || this.high !== 0 || this.low !== expected) {
      fail('found another checksum of the codes');
    }
  }
}

const MAX_TABLE_BYTES = 1200;
const MAX_HEAD_BYTES = 2 ** 15;
const MARKER = 0b0000100100;
const TRELLIS_MARKER = 0b0001100100;

/** Returns the codes of a payload: Int8Array in C order. */
function decodeCodes(data, shape) {
  const size = product(shape);
  if (size === 0 && data.length === 0) return new Int8Array(0);
  if (size === 0 || data.length === 0) {
    fail(`found ${data.length} bytes of codes, expected those of ${size} codes`);
  }
  const marker = ((data[0] << 2) | ((data[1] ?? 0) >> 6)) & 0x3ff;
  if (marker === MARKER || marker === TRELLIS_MARKER) {
    return decodeContexts(data, shape, marker === TRELLIS_MARKER);
  }
  const bits = new Bits(data, MAX_TABLE_BYTES);
  const table = readTable(bits);
  const coder = new Coder(data.subarray(bits.end()), size, table.cheapest);
  const codes = new Int8Array(size);
  coder.take(sharesOf(table, 24), codes, 0, size);
  coder.checkEnd(codes, new Uint8Array(0));
  return codes;
}

// ---- contexts

const MAX_RANGES = 16;
const MAX_TAPS = 1024;
const MAX_WINDOW_AXES = 3;
const CODED_AT_ONCE = 2 ** 18; // weights of a block, and outputs at most
const EDGES = [1, 3, 6, 10, 16, 28, 48, 90, 160]; // of neighbours' mean magnitude, in twelfths
const SCORED_LEVELS = 1 + 2 * (EDGES.length + 1);
const OFFSET = 384;
const KIND_SPAN = 768; // scores of one kind of neighbours

/** Taps, inputs, outputs, window, and the distances of their neighbours in C order. */
function arranged(shape, arrangement) {
  const [count, last] = [shape.length, shape.length - 1];
  const make = (window, inputs, outputs, strides) => {
    const taps = product(window);
    if (window.length > MAX_WINDOW_AXES || taps > MAX_TAPS || outputs > CODED_AT_ONCE) return null;
    return {window, taps, inputs, outputs, strides};
  };
  let found = null;
  if (count >= 2 && arrangement === 0) {
    const [inputs, outputs] = shape.slice(-2);
    found = make(shape.slice(0, -2), inputs, outputs, [inputs * outputs, outputs, 1]);
  } else if (count >= 2 && arrangement === 1) {
    const taps = product(shape.slice(2));
    found = make(shape.slice(2), shape[0], shape[1], [1, shape[1] * taps, taps]);
  } else if (count >= 2 && arrangement === 2) {
    found = make([], product(shape.slice(0, last)), shape[last], [0, shape[last], 1]);
  } else if (count >= 2) {
    const outputs = product(shape.slice(1));
    found = make([], shape[0], outputs, [0, outputs, 1]);
  }
  return found ?? fail(`found arrangement ${arrangement}, expected one of shape [${shape}]`);
}

/** The earlier taps beside a tap, one step along one axis (weight 6) or along two (weight 1). */
function neighboursOf(window, tap) {
  const place = [];
  for (let axis = window.length - 1, rest = tap; axis >= 0; axis--) {
    place[axis] = rest % window[axis];
    rest = Math.floor(rest / window[axis]);
  }
  const found = [];
  const walk = (axis, other, steps) => {
    if (axis === window.length) {
      if (steps >= 1 && steps <= 2 && other < tap) found.push([other, steps === 1 ? 6 : 1]);
      return;
    }
    for (const step of [-1, 0, 1]) {
      const at = place[axis] + step;
      if (at < 0 || at >= window[axis]) continue;
      walk(axis + 1, other * window[axis] + at, steps + Math.abs(step));
    }
  };
  walk(0, 0, 0);
  return found;
}

/** The level of every sum of weighted magnitudes, where signs disagree. */
function levelsOf(weight) {
  return Uint8Array.from({length: 128 * weight + 1}, (_, magnitude) => {
    const twelfths = Math.floor((12 * magnitude) / weight);
    return 1 + 2 * EDGES.filter((edge) => edge <= twelfths).length;
  });
}

function decodeContexts(data, shape, hasTrellis) {
  const bits = new Bits(data, MAX_HEAD_BYTES);
  bits.take(10);
  const {window, taps, inputs, outputs, strides} = arranged(shape, bits.take(2));
  const scored = [0, 1, 2].map(() => (bits.take(1) ? readTable(bits) : null));
  const count = bits.golomb(2) + 1;
  if (count > MAX_RANGES) fail(`found ${count} ranges of scores, expected at most ${MAX_RANGES}`);
  const rangeOf = new Uint8Array(2 * KIND_SPAN);
  for (let range = 1, start = 0; range < count; range++) {
    start = range === 1 ? bits.golomb(8) : start + 1 + bits.golomb(2);
    rangeOf.fill(range, Math.min(start, rangeOf.length));
  }
  const tables = Array.from({length: hasTrellis ? 2 * count : count}, () => readTable(bits));
  const end = bits.end();
  const size = product(shape);
  const cheapest = Math.min(...tables.map((table) => table.cheapest));
  const coder = new Coder(data.subarray(end), size, cheapest);
  const codes = new Int8Array(size);

  const [ofInputs, ofOutputs, ofLevels] = [inputs, outputs, SCORED_LEVELS].map((length, i) => {
    const scores = new Int8Array(length);
    if (scored[i]) coder.take(sharesOf(scored[i], 24), scores, 0, length);
    return Int16Array.from(scores);
  });
  for (let level = 0; level < SCORED_LEVELS; level++) {
    ofLevels[level] += OFFSET + (level > 0 && level % 2 === 0 ? KIND_SPAN : 0);
  }
  const models = tables.map((table) => sharesOf(table, hasTrellis ? table.precision : 24));
  const subsets = hasTrellis ? new Uint8Array(size) : null;
  const most = Math.floor(CODED_AT_ONCE / outputs);
  const [tapStride, inputStride, outputStride] = strides;
  const levels = new Map(); // tables by the weight of all neighbours
  let state = 0;
  for (let tap = 0; tap < taps; tap++) {
    const beside = scored[2] ? neighboursOf(window, tap) : [];
    const weight = beside.reduce((sum, [, w]) => sum + w, 0);
    if (beside.length && !levels.has(weight)) levels.set(weight, levelsOf(weight));
    const levelOf = levels.get(weight);
    for (let row = 0; row < inputs; row += most) {
      const rows = Math.min(most, inputs - row);
      const block = rows * outputs;
      const signed = beside.length ? new Int16Array(block) : null;
      const magnitude = beside.length ? new Int16Array(block) : null;
      for (const [other, w] of beside) {
        for (let i = 0, at = 0; i < rows; i++) {
          let place = other * tapStride + (row + i) * inputStride;
          for (let o = 0; o < outputs; o++, at++, place += outputStride) {
            const c = w * codes[place];
            signed[at] += c;
            magnitude[at] += Math.abs(c);
          }
        }
      }
      // the range of every weight
      const ranges = new Uint8Array(block);
      for (let i = 0, at = 0; i < rows; i++) {
        const ofInput = ofInputs[row + i];
        for (let o = 0; o < outputs; o++, at++) {
          let level = 0;
          if (signed) {
            level = levelOf[magnitude[at]] + (2 * Math.abs(signed[at]) >= magnitude[at] ? 1 : 0);
          }
          ranges[at] = rangeOf[ofInput + ofOutputs[o] + ofLevels[level]];
        }
      }
      const found = new Int8Array(block);
      const own = hasTrellis ? new Uint8Array(block) : null;
      if (hasTrellis) state = coder.takeAlongTrellis(models, ranges, state, found, own);
      else takeRanges(coder, models, ranges, found);
      for (let i = 0, at = 0; i < rows; i++) {
        let place = tap * tapStride + (row + i) * inputStride;
        for (let o = 0; o < outputs; o++, at++, place += outputStride) {
          codes[place] = signed && signed[at] < 0 ? -found[at] : found[at];
          if (own) subsets[place] = own[at];
        }
      }
    }
  }
  if (hasTrellis) joinSubsets(codes, subsets);
  coder.checkEnd(codes, data.subarray(0, end));
  return codes;
}

/** Takes the codes of a block: all of range 0 in C order, then those of range 1, and so on. */
function takeRanges(coder, models, ranges, out) {
  const next = new Uint32Array(models.length + 1);
  for (let i = 0; i < ranges.length; i++) next[ranges[i] + 1]++;
  const inOrder = new Int8Array(ranges.length);
  for (let range = 0; range < models.length; range++) {
    next[range + 1] += next[range];
    coder.take(models[range], inOrder, next[range], next[range + 1]);
  }
  for (let i = 0; i < ranges.length; i++) out[i] = inOrder[next[ranges[i]]++];
}

// ---- trellis

const parity = (state) => (state ^ (state >> 1) ^ (state >> 2) ^ (state >> 3) ^ (state >> 4)) & 1;
/** The subset that each state selects, and the states after it, by the parity of the index. */
const SUBSET_OF = Uint8Array.from({length: 32}, (_, state) => parity(state & 9));
const NEXT = Uint8Array.from({length: 64}, (_, place) => {
  const [state, odd] = [place >> 1, place & 1];
  return ((state << 1) & 31) | (parity(state & 29) ^ odd);
});

/** Makes codes of indices in their subsets, in place. */
function joinSubsets(indices, subsets) {
  for (let i = 0; i < indices.length; i++) {
    const index = indices[i];
    const code = 2 * index - Math.sign(index) * subsets[i];
    if (Math.abs(code) > MAX_LEVELS) fail(`found code ${code}, expected -127 to 127`);
    indices[i] = code;
  }
}

// ---- escapes

const PIECE = 2 ** 16; // gaps whose bits are padded to whole bytes together

/** Returns the positions of escaped weights, and the bytes of their values. */
function decodeEscapes(data, size, count, kind) {
  const end = data.length - 4;
  const wrong = () => fail(`found ${data.length} bytes of escaped weights that are none`);
  if (end < 4) wrong();
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  checkCrc('escaped weights', crc32(data.subarray(0, end)), view.getUint32(end, true));
  let at = 4 + view.getUint32(0, true);
  if (at > end) wrong();
  const buckets = decodeCodes(data.subarray(4, at), [count]);
  const most = size > 1 ? (size - 1).toString(2).length : 0;
  const positions = new Array(count);
  for (let begin = 0, last = -1; begin < count; begin += PIECE) {
    const bits = new Bits(data.subarray(at, end), Infinity);
    for (let i = begin; i < Math.min(begin + PIECE, count); i++) {
      const bucket = buckets[i];
      if (bucket < 0 || bucket > most) fail(`found bucket ${bucket}, expected 0 to ${most}`);
      last += 1 + (bucket ? 2 ** (bucket - 1) + bits.take(bucket - 1) : 0);
      if (last >= size) fail(`found an escaped weight beyond the ${size} of the leaf`);
      positions[i] = last;
    }
    at += bits.end();
  }
  if (at + 5 > end) wrong();
  const headsEnd = at + 5 + view.getUint32(at, true);
  const usual = data[at + 4];
  const width = kind.bytes - 1;
  const rest = data.subarray(headsEnd, end);
  if (headsEnd > end || rest.length !== (width ? count * width : Math.ceil(count / 8))) wrong();
  const heads = decodeCodes(data.subarray(at + 5, headsEnd), [count]);
  const values = new Uint8Array(count * kind.bytes);
  const signs = new Bits(rest, Infinity);
  for (let i = 0; i < count; i++) {
    const head = (heads[i] + usual) & 255;
    if (width === 0) {
      if (head > 127) fail('found heads of escaped values that no value has');
      values[i] = (signs.take(1) << 7) | head;
      continue;
    }
    // the sign, which stands above the bits below the head, changes places with the head
    const place = i * kind.bytes;
    for (let j = 0; j < width; j++) values[place + j] = rest[i * width + j];
    const top = values[place + width - 1];
    values[place + width - 1] = (top & 127) | ((head & 1) << 7);
    values[place + width] = (top & 128) | (head >> 1);
  }
  if (width === 0) signs.end();
  checkFinite(values, kind);
  return {positions, values};
}

function checkFinite(bytes, {array, format}) {
  const values = new array(bytes.buffer);
  const isFiniteValue = format ? (bits) => Number.isFinite(valueOf(bits, format)) : Number.isFinite;
  if (!values.every(isFiniteValue)) {
    fail('found escaped weights that are NaN or infinite, expected none');
  }
}

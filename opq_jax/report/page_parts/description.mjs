/**
 * Describes an open .opq file as `opq_jax.report.file_description` does: its leaves with their sizes
 * and the counts of their codes.
 *
 * The definitions of the sizes stand in docs/method/index.md.  `nominal` takes the largest magnitude
 * of a channel from the grid, before it is rounded to a dtype narrower than float32.
 */

const ESCAPE = -128; // the code of an escaped weight
const MAX_LEVELS = 127;
const MAX_NAME = 1000; // characters of a name that patterns see: a hostile one takes no time
const LEAST_TIME = 50; // milliseconds between two looks at the events of the page

/**
 * Returns the description of a file; decodes and checks all of it.
 *
 * @param {OpqFile} file an open file
 * @param {{name: string, bytes: number}} about its name and its size
 * @param {(done: number, all: number) => void} progress called from time to time
 * @throws {Error} the file is damaged
 */
export async function describe(file, {name, bytes}, progress = () => {}) {
  file.readSideFiles(); // checked, as every leaf is
  const stored = file.sizes();
  const leaves = [];
  let last = Date.now();
  for (const path of file.names) {
    leaves.push(describeLeaf(file, path, stored.get(path)));
    if (Date.now() - last < LEAST_TIME) continue;
    progress(leaves.length, file.names.length);
    await new Promise((resume) => setTimeout(resume));
    last = Date.now();
  }
  const inFile = leaves.reduce((sum, leaf) => sum + leaf.bytes, 0);
  // zeros in the places of an optimizer's state would make a network look larger than it was
  const isWhole = file.metadata.optimizer !== 'left_out';
  const original = leaves.reduce((sum, leaf) => sum + leaf.original, 0);
  const asFloat32 = leaves.reduce((sum, {dtype, shape, original}) => {
    return sum + (dtype.includes('float') ? 4 * product(shape) : original);
  }, 0);
  return {
    name,
    bytes,
    headers: bytes - inFile - file.sideBytes,
    sideBytes: file.sideBytes,
    sideFiles: [...file.sideFiles],
    metadata: Object.entries(file.metadata),
    original: isWhole ? original : null,
    asFloat32: isWhole ? asFloat32 : null,
    leaves,
  };
}

function describeLeaf(file, path, bytes) {
  const {shape, dtype, slices, tiedTo} = file.entry(path);
  const {codes, values} = file.leaf(path);
  const leaf = {path, shape, dtype, original: values.byteLength, bytes, tiedTo, codes: null};
  if (!codes) return leaf;
  const {axes, scaleAxis, rotatedAxis, grids} = file.coding(path);
  const own = shape.slice(slices);
  const channels = channelAxis(path, own, file.metadata.channel_axis);
  const size = product(own);
  const width = rotatedAxis === null ? values.BYTES_PER_ELEMENT : 4; // of an escaped weight
  const outputs = scaleAxis === null ? 0 : own[scaleAxis];
  const total = {survivors: 0, escaped: 0, levels: 0, deadChannels: 0, deadRows: 0};
  Object.assign(total, {nominal: 0, packed: 0, entropy: 0});
  const counts = new Float64Array(256);
  grids.forEach((grid, slice) => {
    const part = codes.subarray(slice * size, (slice + 1) * size);
    const found = sizesOf(part, own, channels, axes, grid, width, outputs);
    for (const [key, number] of Object.entries(found.sizes)) total[key] += number;
    total.levels = Math.max(total.levels, grid.levels);
    found.counts.forEach((count, code) => (counts[code] += count));
  });
  for (const key of ['nominal', 'entropy']) total[key] = Math.round(10 * total[key]) / 10;
  leaf.codes = {
    ...total,
    slices: slices ? grids.length : 0,
    isRotated: rotatedAxis !== null,
    scaledOutputs: outputs * grids.length,
    grids: Object.fromEntries(['threshold', 'first', 'step'].map((key) => [key, ends(grids, key)])),
    counts: centred(counts),
  };
  return leaf;
}

/** The least and the largest number of all grids. */
function ends(grids, key) {
  let [least, largest] = [Infinity, -Infinity];
  for (const grid of grids) {
    least = Math.min(least, grid[key]);
    largest = Math.max(largest, grid[key]);
  }
  return [least, largest];
}

/** The counts of the codes -m to m, of which the outermost occur; of every int8, by their bytes. */
function centred(counts) {
  let most = 0;
  for (let code = 1; code <= MAX_LEVELS; code++) {
    if (counts[code] || counts[256 - code]) most = code;
  }
  return Array.from({length: 2 * most + 1}, (_, i) => counts[(i - most) & 255]);
}

/** Sizes and counts of one slice. */
function sizesOf(codes, shape, channelAxis, axes, grid, width, outputs) {
  const axis = shape.length > 1 ? channelAxis : null;
  const channels = axis === null ? 1 : shape[axis];
  const inside = axis === null ? codes.length : product(shape.slice(axis + 1));
  const counts = new Float64Array(256);
  const largest = new Uint8Array(channels); // of |code|
  const survivors = new Float64Array(channels);
  const escapes = new Float64Array(channels);
  for (let i = 0, channel = 0; i < codes.length; channel = (channel + 1) % channels) {
    for (const stop = i + inside; i < stop; i++) {
      const code = codes[i];
      counts[code & 255]++;
      if (code === 0) continue;
      survivors[channel]++;
      if (code === ESCAPE) escapes[channel]++;
      else if (Math.abs(code) > largest[channel]) largest[channel] = Math.abs(code);
    }
  }
  const {threshold, first, step, levels, scaleBytes} = grid;
  const [kept, escaped] = [sum(survivors), sum(escapes)];
  let bits = 0;
  for (let channel = 0; channel < channels; channel++) {
    const code = largest[channel];
    const reach = code ? (first + step * (code - 1) - threshold) / step : 1;
    const own = 1 + Math.log2(Math.min(Math.max(reach, 1), MAX_LEVELS));
    bits += (survivors[channel] - escapes[channel]) * own;
  }
  // if weights escape, 'escaped' is one more symbol of a survivor
  const symbols = 2 * levels + (escaped > 0 ? 1 : 0);
  const codeBits = symbols ? Math.ceil(Math.log2(symbols)) : 0;
  const values = escaped * width;
  const [codeBytes, maskBytes] = [Math.ceil((kept * codeBits) / 8), Math.ceil(codes.length / 8)];
  const sizes = {
    survivors: kept,
    escaped,
    deadChannels: survivors.filter((count) => count === 0).length,
    deadRows: shape.length > 1 ? deadRows(codes, shape[0]) : 0,
    nominal: bits / 8 + values,
    packed: codeBytes + maskBytes + 4 * levels + values + outputs,
    entropy: entropyBits(codes, shape, axes, counts) / 8 + values + scaleBytes,
  };
  return {sizes, counts};
}

/** The indices of the first axis at which all codes are 0. */
function deadRows(codes, rows) {
  const size = codes.length / rows;
  let dead = 0;
  for (let row = 0; row < rows; row++) {
    let i = row * size;
    const stop = i + size;
    while (i < stop && codes[i] === 0) i++;
    if (i === stop) dead++;
  }
  return dead;
}

// ---- entropy

/** The bits of codes at their entropy: of their indices given the subsets, along a trellis. */
function entropyBits(codes, shape, axes, counts) {
  if (shape.length > 1) {
    const own = shape.map((_, axis) => axis);
    const orders = [own];
    if (shape.length > 2) orders.push([...own.slice(2), 0, 1]);
    if (axes) orders.push(axes);
    for (const order of orders) {
      const subsets = countsAlongTrellis(codes, shape, order);
      if (subsets) return idealBits(subsets[0]) + idealBits(subsets[1]);
    }
  }
  return idealBits(counts);
}

function idealBits(counts) {
  const total = sum(counts);
  let bits = 0;
  for (const count of counts) if (count) bits += count * Math.log2(total / count);
  return bits;
}

const parity = (state) => (state ^ (state >> 1) ^ (state >> 2) ^ (state >> 3) ^ (state >> 4)) & 1;

/** The counts of indices by subset; null where codes, with the axes in an order, leave the trellis. */
function countsAlongTrellis(codes, shape, order) {
  const strides = shape.map((_, axis) => product(shape.slice(axis + 1)));
  const counts = [new Float64Array(256), new Float64Array(256)];
  const index = order.map(() => 0);
  let state = 0;
  for (let i = 0, place = 0; i < codes.length; i++) {
    const escaped = codes[place] === ESCAPE;
    const code = escaped ? 0 : codes[place];
    const subset = parity(state & 9);
    // 0 is in both subsets; any other code is in that of its own parity
    if (code && (code & 1) !== subset) return null;
    const symbol = Math.sign(code) * ((Math.abs(code) + 1) >> 1);
    counts[subset][(escaped ? ESCAPE : symbol) & 255]++;
    state = ((state << 1) & 31) | (parity(state & 29) ^ (symbol & 1));
    for (let at = order.length - 1; at >= 0; at--) {
      place += strides[order[at]];
      if (++index[at] < shape[order[at]]) break;
      place -= strides[order[at]] * shape[order[at]];
      index[at] = 0;
    }
  }
  return counts;
}

// ---- names

const TORCH =
  /^(?:.*weight(?:_(?:ih|hh|hr)_l\d+(?:_reverse)?|_orig|_v|_g|_u)?|.*parametrizations.*)$/;
const TABLE = /^(?:.*emb.*|wte|wpe|shared)$/;
const TRANSPOSED = /^(?:(?:.*_)?(?:up|upconv|up_conv|deconv|upsample|.*transposed?)\d*)$/;
const GPT2 = /^c_(?:attn|fc|proj)$/;

/** The axis of the output channels, by name: `opq_jax.weights.channel_axis`. */
function channelAxis(path, shape, mode) {
  const count = shape.length;
  if (mode === 'first') return 0;
  if (mode === 'last') return count - 1;
  const modules = path.slice(-MAX_NAME).split(/[./]/);
  const name = modules.pop();
  const module = (modules[modules.length - 1] ?? '').toLowerCase();
  if (!TORCH.test(modules.includes('parametrizations') ? path.slice(-MAX_NAME) : name)) {
    const isDepthwise = name.includes('depthwise') && count === 4 && shape[3] === 1;
    return count - (isDepthwise ? 2 : 1);
  }
  if (count === 2 && TABLE.test(module)) return 1;
  if (count > 2 && TRANSPOSED.test(module)) return 1;
  if (count === 2 && GPT2.test(module)) {
    const hasLastLonger = shape[1] > shape[0];
    return shape[0] === shape[1] || hasLastLonger === (module !== 'c_proj') ? 1 : 0;
  }
  return 0;
}

const product = (numbers) => numbers.reduce((all, n) => all * n, 1);
const sum = (numbers) => numbers.reduce((all, n) => all + n, 0);

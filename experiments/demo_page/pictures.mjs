// From a picture's pixels to a network's input, with the numbers of opq_jax.data.Preprocessing:
//
//   input = (crop(resize(pixels)) / 255 - mean) / std
//
// Resizing is Pillow's: a filter whose support grows when a picture shrinks, in fixed point, along
// rows first and rounded to bytes between the two directions.  A canvas's own filter differs from
// browser to browser.

const FIXED_BITS = 22; // of Pillow's coefficients: 32 - 8 of a byte - 2 of sums above one
const CHANNELS = 3;

const FILTERS = {
  bilinear: {support: 1, weight: (x) => Math.max(1 - Math.abs(x), 0)},
  bicubic: {
    support: 2,
    weight: (x) => {
      const a = -0.5;
      const t = Math.abs(x);
      if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
      return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
    },
  },
};

/** Returns RGB of RGBA. */
export function withoutAlpha(rgba) {
  const count = rgba.length / 4;
  const rgb = new Uint8Array(CHANNELS * count);
  for (let i = 0; i < count; i++) {
    for (let channel = 0; channel < CHANNELS; channel++) {
      rgb[CHANNELS * i + channel] = rgba[4 * i + channel];
    }
  }
  return rgb;
}

/** Returns the pixels that the network sees: {pixels, width, height}, RGB. */
export function prepared(image, {resize, crop, resample}) {
  let seen = image;
  const shorter = Math.min(image.width, image.height);
  if (resize !== null && shorter !== resize) {
    const side = (length) => Math.floor((resize * length) / shorter);
    seen = resized(image, side(image.width), side(image.height), FILTERS[resample]);
  }
  return crop === null ? seen : centre(seen, crop);
}

/** Returns a Float32Array of the pixels, standardised in float32. */
export function standardised(pixels, {mean, std}) {
  const input = new Float32Array(pixels.length);
  const means = mean.map((value) => Math.fround(255 * value));
  const stds = std.map((value) => Math.fround(255 * value));
  for (let i = 0; i < pixels.length; i++) {
    const channel = i % CHANNELS;
    input[i] = Math.fround(pixels[i] - means[channel]) / stds[channel];
  }
  return input;
}

/** Returns the middle of an image, of this side. */
function centre({pixels, width, height}, side) {
  if (Math.min(width, height) < side) {
    throw new Error(`found a picture of ${width} x ${height} pixels, expected ${side} or more`);
  }
  const [top, left] = [height, width].map((length) => roundToEven((length - side) / 2));
  const out = new Uint8Array(CHANNELS * side * side);
  for (let row = 0; row < side; row++) {
    const begin = CHANNELS * ((top + row) * width + left);
    out.set(pixels.subarray(begin, begin + CHANNELS * side), CHANNELS * row * side);
  }
  return {pixels: out, width: side, height: side};
}

/** Rounds as Python does: halves to even. */
function roundToEven(x) {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

function resized({pixels, width, height}, newWidth, newHeight, filter) {
  const wide = new Uint8Array(CHANNELS * newWidth * height);
  const along = coefficients(width, newWidth, filter);
  for (let row = 0; row < height; row++) {
    const begin = CHANNELS * row * width;
    weighted(pixels, begin, CHANNELS, along, wide, CHANNELS * row * newWidth, CHANNELS);
  }
  const out = new Uint8Array(CHANNELS * newWidth * newHeight);
  const down = coefficients(height, newHeight, filter);
  const stride = CHANNELS * newWidth;
  for (let column = 0; column < newWidth; column++) {
    weighted(wide, CHANNELS * column, stride, down, out, CHANNELS * column, stride);
  }
  return {pixels: out, width: newWidth, height: newHeight};
}

/** For each new pixel of a line: the first old one that it reads, and the weights of its run. */
function coefficients(size, newSize, {support, weight}) {
  const scale = size / newSize;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({length: newSize}, (_, i) => {
    const middle = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(middle - reach + 0.5), 0);
    const end = Math.min(Math.trunc(middle + reach + 0.5), size);
    const at = (x) => weight((x + first - middle + 0.5) * (1 / stretch));
    const weights = Array.from({length: end - first}, (_, x) => at(x));
    const total = weights.reduce((sum, one) => sum + one, 0);
    const fixed = weights.map((one) => {
      const scaled = (one / total) * 2 ** FIXED_BITS;
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    return {first, weights: Int32Array.from(fixed)};
  });
}

/** Computes a line of new pixels from a line of old ones, whose pixels lie `step` apart. */
function weighted(from, begin, step, runs, into, intoBegin, intoStep) {
  for (let i = 0; i < runs.length; i++) {
    const {first, weights} = runs[i];
    for (let channel = 0; channel < CHANNELS; channel++) {
      let sum = 2 ** (FIXED_BITS - 1);
      let place = begin + first * step + channel;
      for (let k = 0; k < weights.length; k++, place += step) sum += from[place] * weights[k];
      const byte = sum >> FIXED_BITS;
      into[intoBegin + i * intoStep + channel] = byte < 0 ? 0 : byte > 255 ? 255 : byte;
    }
  }
}

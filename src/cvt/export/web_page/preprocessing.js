// Decoded pictures to the pixels of the model, bit for bit as cvt.data.preprocessing computes them
// with Pillow and numpy.

import { Refusal } from "./decode.js";

/** Pillow's filters: half their width, and their weight at a distance. */
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
  bicubic: [2, bicubic],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** For each output pixel of a line: the first input pixel, and the weights from it on. */
function weights(inputs, outputs, [support, filter]) {
  const scale = inputs / outputs;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: outputs }, (_, output) => {
    const centre = (output + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(inputs, Math.trunc(centre + reach + 0.5));
    const exact = [];
    let sum = 0;
    for (let i = first; i < end; i++) {
      const weight = filter((i - centre + 0.5) * (1 / stretch));
      exact.push(weight);
      sum += weight;
    }
    const whole = exact.map((weight) => {
      const scaled = (sum ? weight / sum : weight) * 2 ** 22;
      return Math.trunc(scaled + (weight < 0 ? -0.5 : 0.5));
    });
    return [first, Int32Array.from(whole)];
  });
}

/**
 * Resize a picture in 8 bits, first its rows and then its columns, as Pillow's `Image.resize`.
 *
 * @param {{width: number, height: number, data: Uint8Array}} picture RGB
 * @param {string} filter a key of FILTERS
 */
export function resize({ width, height, data }, newWidth, newHeight, filter) {
  let out = data;
  if (newWidth !== width) {
    const source = out;
    const horizontal = weights(width, newWidth, FILTERS[filter]);
    out = new Uint8ClampedArray(3 * newWidth * height);
    for (let y = 0, to = 0; y < height; y++) {
      for (const [first, row] of horizontal) {
        to = blend(source, 3 * (y * width + first), 3, row, out, to);
      }
    }
  }
  if (newHeight !== height) {
    const source = out;
    const vertical = weights(height, newHeight, FILTERS[filter]);
    out = new Uint8ClampedArray(3 * newWidth * newHeight);
    let to = 0;
    for (const [first, column] of vertical) {
      for (let x = 0; x < newWidth; x++) {
        to = blend(source, 3 * (first * newWidth + x), 3 * newWidth, column, out, to);
      }
    }
  }
  return { width: newWidth, height: newHeight, data: out };
}

/** The weighted sum of pixels `step` bytes apart, written at `to`; returns the next place. */
function blend(source, from, step, factors, out, to) {
  let red = 2 ** 21; // rounds
  let green = red;
  let blue = red;
  for (let i = 0; i < factors.length; i++, from += step) {
    const factor = factors[i];
    red = (red + factor * source[from]) | 0;
    green = (green + factor * source[from + 1]) | 0;
    blue = (blue + factor * source[from + 2]) | 0;
  }
  out[to] = red >> 22; // the array clamps to 0..255
  out[to + 1] = green >> 22;
  out[to + 2] = blue >> 22;
  return to + 3;
}

/** The size that a picture is resized to before it is cropped; settings are those of page.json. */
function resizedSize({ width, height }, { image_size, shortest_edge }) {
  if (shortest_edge === null) return [image_size, image_size];
  const shorter = Math.min(width, height);
  return [width, height].map((side) => Math.floor((shortest_edge * side) / shorter));
}

/** Resized and cropped: a picture of the size that the model takes. */
export function fitted(picture, settings) {
  if (settings.filter === null) return picture;
  const resized = resize(picture, ...resizedSize(picture, settings), settings.filter);
  const side = settings.image_size;
  const left = Math.floor((resized.width - side) / 2);
  const top = Math.floor((resized.height - side) / 2);
  const data = new Uint8Array(3 * side * side); // what a crop has beyond the picture is black
  for (let y = Math.max(0, -top); y < Math.min(side, resized.height - top); y++) {
    for (let x = Math.max(0, -left); x < Math.min(side, resized.width - left); x++) {
      const from = 3 * ((top + y) * resized.width + left + x);
      data.set(resized.data.subarray(from, from + 3), 3 * (y * side + x));
    }
  }
  return { width: side, height: side, data };
}

/** The pixels of the model, (3, height, width) in float32, of a fitted picture. */
export function normalised({ width, height, data }, settings) {
  const size = width * height;
  const pixels = new Float32Array(3 * size);
  for (let channel = 0; channel < 3; channel++) {
    const values = levels(settings, channel);
    for (let i = 0; i < size; i++) pixels[channel * size + i] = values[data[3 * i + channel]];
  }
  return pixels;
}

/** What the levels 0 to 255 of a channel become; each step is rounded to float32, as in Python. */
function levels({ rescale_factor, image_mean, image_std }, channel) {
  const round = Math.fround;
  const [mean, std] = [round(image_mean[channel]), round(image_std[channel])];
  return Float32Array.from({ length: 256 }, (_, level) =>
    round(round(round(level * rescale_factor) - mean) / std),
  );
}

/**
 * All of it: the pixels of a decoded picture, and their size.
 *
 * @throws {Refusal} the model takes pictures of one size only, and does not resize
 */
export function preprocess(picture, settings) {
  const { width, height, data } = fitted(picture, settings);
  const side = settings.image_size;
  if (!settings.any_size && (width !== side || height !== side)) {
    throw new Refusal("size", { width, height, side });
  }
  return { width, height, pixels: normalised({ width, height, data }, settings) };
}

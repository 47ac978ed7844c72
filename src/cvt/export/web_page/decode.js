// Picture files to upright 8-bit RGB, with the levels that cvt.data.decode gives them in Python.
//
// The browser decodes. It is asked to ignore colour profiles, as Python does, and it turns JPEG, PNG
// and AVIF by their EXIF orientation. Two things it does differently are done here: WebP is turned,
// and 16-bit greyscale PNG is rounded to 8 bits instead of cut.

const SIGNATURES = {
  JPEG: (head) => head.startsWith("\xff\xd8\xff"),
  PNG: (head) => head.startsWith("\x89PNG\r\n\x1a\n"),
  GIF: (head) => /^GIF8[79]a/.test(head),
  WebP: (head) => /^RIFF[^]{4}WEBP/.test(head),
  BMP: (head) => head.startsWith("BM"),
  AVIF: (head) => /^[^]{4}ftypavi[fs]/.test(head),
  HEIC: (head) => /^[^]{4}ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)/.test(head),
  TIFF: (head) => /^(II[*+]\0|MM\0[*+])/.test(head),
  PPM: (head) => /^P[1-6]\s/.test(head),
};
const MAX_PIXELS = 178_956_970; // as in Python
const MAX_ASPECT = 1000; // likewise
const STRIP_PIXELS = 2 ** 22; // read at a time: some browsers have no larger canvas

/** A picture that cannot be used. `reason` is a key of `refusals` in texts.js. */
export class Refusal extends Error {
  constructor(reason, values = {}) {
    super(reason);
    this.reason = reason;
    this.values = values;
  }
}

/**
 * Decode a picture file.
 *
 * @param {Blob} file
 * @returns {Promise<{width: number, height: number, data: Uint8Array}>} RGB, row by row
 */
export async function decode(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const head = String.fromCharCode(...bytes.subarray(0, 16));
  const kind = Object.keys(SIGNATURES).find((name) => SIGNATURES[name](head));
  if (!kind) throw new Refusal(bytes.length ? "unknown" : "empty");
  if (kind === "PNG" && isGrey16(bytes)) return turned(await grey16(bytes), pngOrientation(bytes));
  const orientation = kind === "WebP" ? takeWebpOrientation(bytes) : 1;
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes]), {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new Refusal("undecodable", { kind });
  }
  checkSize(bitmap);
  const rgb = read(bitmap);
  bitmap.close();
  return turned(rgb, orientation);
}

function checkSize({ width, height }) {
  if (width * height > MAX_PIXELS) throw new Refusal("pixels", { width, height });
  if (Math.max(width, height) > MAX_ASPECT * Math.min(width, height)) {
    throw new Refusal("aspect", { width, height });
  }
}

/** The levels of a bitmap, what is transparent over white. */
function read(bitmap) {
  const { width, height } = bitmap;
  const data = new Uint8Array(3 * width * height);
  const rows = Math.min(height, Math.max(1, Math.floor(STRIP_PIXELS / width)));
  const context = new OffscreenCanvas(width, rows).getContext("2d", { willReadFrequently: true });
  let to = 0;
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
    const rgba = context.getImageData(0, 0, width, count).data;
    for (let from = 0; from < rgba.length; from += 4) {
      const alpha = rgba[from + 3];
      for (let channel = 0; channel < 3; channel++) {
        const scaled = alpha * rgba[from + channel] + 128;
        data[to++] = 255 - alpha + (((scaled >> 8) + scaled) >> 8); // Pillow's division by 255
      }
    }
  }
  return { width, height, data };
}

/** The picture turned and mirrored as an EXIF orientation, 1 to 8, asks for. */
function turned({ width, height, data }, orientation) {
  if (!(orientation >= 2 && orientation <= 8)) return { width, height, data };
  const swapped = orientation >= 5;
  const [W, H] = swapped ? [height, width] : [width, height];
  const mirroredX = [2, 3, 7, 8].includes(orientation); // of the columns in the file, or rows
  const mirroredY = [3, 4, 6, 7].includes(orientation);
  const out = new Uint8Array(data.length);
  for (let y = 0, to = 0; y < H; y++) {
    for (let x = 0; x < W; x++) {
      let [column, row] = swapped ? [y, x] : [x, y];
      if (mirroredX) column = width - 1 - column;
      if (mirroredY) row = height - 1 - row;
      const from = 3 * (row * width + column);
      for (let channel = 0; channel < 3; channel++) out[to++] = data[from + channel];
    }
  }
  return { width: W, height: H, data: out };
}

// EXIF

/** Where the orientation stands in an EXIF block, and its value; null if it has none. */
function findOrientation(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    const little = view.getUint16(0) === 0x4949;
    const start = view.getUint32(4, little);
    const entries = view.getUint16(start, little);
    for (let place = start + 2; place < start + 2 + 12 * entries; place += 12) {
      if (view.getUint16(place, little) === 0x0112) {
        const value = view.getUint16(place + 8, little);
        return { value, reset: () => view.setUint16(place + 8, 1, little) };
      }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // unreadable EXIF is ignored, as in Python
  }
  return null;
}

/** The orientation of a WebP. It is set to 1 in `bytes`: browsers differ in applying it. */
function takeWebpOrientation(bytes) {
  const view = new DataView(bytes.buffer);
  for (let place = 12; place + 8 <= bytes.length; ) {
    const size = view.getUint32(place + 4, true);
    if (nameAt(bytes, place) === "EXIF") {
      let block = bytes.subarray(place + 8, place + 8 + size);
      if (nameAt(block, 0) === "Exif") block = block.subarray(6);
      const found = findOrientation(block);
      found?.reset();
      return found?.value ?? 1;
    }
    place += 8 + size + (size % 2);
  }
  return 1;
}

const nameAt = (bytes, place) => String.fromCharCode(...bytes.subarray(place, place + 4));

// PNG in 16-bit greyscale

/** The chunks of a PNG: name and content. */
function* chunks(bytes) {
  const view = new DataView(bytes.buffer);
  for (let place = 8; place + 12 <= bytes.length; ) {
    const size = view.getUint32(place);
    yield [nameAt(bytes, place + 4), bytes.subarray(place + 8, place + 8 + size)];
    place += 12 + size;
  }
}

/** Whether a PNG has 16-bit greyscale without alpha. Of interlaced ones, the browser's are close. */
const isGrey16 = (bytes) => bytes[24] === 16 && bytes[25] === 0 && bytes[28] === 0;

function pngOrientation(bytes) {
  for (const [name, content] of chunks(bytes)) {
    if (name === "eXIf") return findOrientation(content)?.value ?? 1;
  }
  return 1;
}

async function grey16(bytes) {
  const view = new DataView(bytes.buffer);
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  checkSize({ width, height });
  const found = [...chunks(bytes)];
  const packed = found.filter(([name]) => name === "IDAT").map(([, content]) => content);
  const tRNS = found.find(([name]) => name === "tRNS")?.[1];
  const transparent = tRNS ? 256 * tRNS[0] + tRNS[1] : -1;
  const stride = 2 * width;
  let lines;
  try {
    const stream = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
    lines = new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new Refusal("undecodable", { kind: "PNG" });
  }
  if (lines.length < (stride + 1) * height) throw new Refusal("undecodable", { kind: "PNG" });
  const data = new Uint8Array(3 * width * height);
  let above = new Uint8Array(stride);
  for (let y = 0; y < height; y++) {
    const start = y * (stride + 1);
    const line = lines.subarray(start + 1, start + 1 + stride);
    unfilter(lines[start], line, above);
    for (let x = 0; x < width; x++) {
      const value = 256 * line[2 * x] + line[2 * x + 1];
      const level = value === transparent ? 255 : Math.floor((255 * value + 32767) / 65535);
      data.fill(level, 3 * (y * width + x), 3 * (y * width + x) + 3);
    }
    above = line;
  }
  return { width, height, data };
}

/** Undo the filter of a line of 2-byte pixels, in place. */
function unfilter(filter, line, above) {
  for (let i = 0; i < line.length; i++) {
    const a = i < 2 ? 0 : line[i - 2];
    const b = above[i];
    const c = i < 2 ? 0 : above[i - 2];
    if (filter === 1) line[i] += a;
    else if (filter === 2) line[i] += b;
    else if (filter === 3) line[i] += (a + b) >> 1;
    else if (filter === 4) line[i] += paeth(a, b, c);
  }
}

function paeth(a, b, c) {
  const [toA, toB, toC] = [Math.abs(b - c), Math.abs(a - c), Math.abs(a + b - 2 * c)];
  if (toA <= toB && toA <= toC) return a;
  return toB <= toC ? b : c;
}

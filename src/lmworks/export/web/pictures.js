// Pictures to pixel_values (3, H, W): decode, resize, crop, rescale, normalize, as src/lmworks/tasks/image.py does.
//
// A PNG is decoded here, so that its numbers are those of the file (a canvas multiplies colours by their alpha and may
// convert them); other kinds are left to the browser, or in Node to transformers.js. Resizing is Pillow's, to the bit:
// two passes in whole numbers, each with weights of 22 bits after the point, across and then down. (For some sizes Pillow
// 13 was seen to go down first: some of its bytes then differ by 1.)

const version = new URL(import.meta.url).search;
const { InputError } = await import(`./encoding.js${version}`);
const { decodePng, readOrientation, turn } = await import(`./png.js${version}`);

const DEFAULTS = {
  do_resize: true, size: { height: 224, width: 224 }, resample: 2, do_center_crop: false, crop_size: { height: 224, width: 224 },
  do_rescale: true, rescale_factor: 1 / 255, do_normalize: true, image_mean: [0.5, 0.5, 0.5], image_std: [0.5, 0.5, 0.5],
}; // of the ViT family
const KNOWN = [...Object.keys(DEFAULTS), "do_convert_rgb", "do_reduce_labels"];
const MOST = 89478485; // pixels: Pillow's own limit
const BITS = 22;
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const FILTERS = { // Pillow's numbers: how far a filter reaches, and its weight at a distance
  1: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, (x) => cubic(Math.abs(x), -0.5)],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  5: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)) : 0)],
};

function cubic(x, a) {
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Check a preprocessor_config.json; the result is what `prepare` wants.
export function readSteps(config) {
  const given = Object.fromEntries(Object.entries(config ?? {}).filter(([, value]) => value !== null));
  const steps = { ...DEFAULTS, ...given };
  const strange = Object.keys(given).filter((key) => key.startsWith("do_") && given[key] && !KNOWN.includes(key));
  if (strange.length || (steps.resample !== 0 && !FILTERS[steps.resample])) {
    throw new Error(`This page cannot prepare pictures for this model (${strange.join(", ") || `resample ${steps.resample}`}).`);
  }
  for (const key of ["size", "crop_size"]) {
    if (typeof steps[key] === "number") steps[key] = { height: steps[key], width: steps[key] };
  }
  return steps;
}

// pixel_values of a picture { width, height, data: RGB } as { data: Float32Array, dims: [1, 3, H, W] }.
export function prepare(picture, steps) {
  let { width, height, data } = picture;
  if (steps.do_resize) {
    const wanted = targetSize(width, height, steps.size);
    data = resize(data, width, height, ...wanted, steps.resample);
    [width, height] = wanted;
  }
  if (steps.do_center_crop) {
    data = crop(data, width, height, steps.crop_size);
    ({ width, height } = steps.crop_size);
  }
  const each = (value, i) => (Array.isArray(value) ? value[i] : value);
  const values = new Float32Array(3 * width * height);
  for (let colour = 0; colour < 3; colour += 1) {
    const scale = steps.do_rescale ? each(steps.rescale_factor, colour) : 1;
    const [mean, std] = steps.do_normalize ? [steps.image_mean, steps.image_std].map((v) => Math.fround(each(v, colour))) : [0, 1];
    for (let i = 0; i < width * height; i += 1) {
      const value = Math.fround(data[3 * i + colour] * scale);
      values[colour * width * height + i] = Math.fround(value - mean) / std;
    }
  }
  return { data: values, dims: [1, 3, height, width] };
}

function targetSize(width, height, size) {
  if (size.height) return [size.width, size.height];
  const short = size.shortest_edge;
  const long = Math.trunc((short * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? [short, long] : [long, short];
}

export function resize(data, width, height, newWidth, newHeight, resample) {
  if (width === newWidth && height === newHeight) return data;
  if (resample === 0) return pick(data, width, height, newWidth, newHeight);
  const [support, weigh] = FILTERS[resample];
  if (width !== newWidth) data = pass(data, makeWeights(width, newWidth, support, weigh), height, newWidth, 3, width * 3, newWidth * 3, 3);
  if (height !== newHeight) data = pass(data, makeWeights(height, newHeight, support, weigh), newWidth, newHeight, newWidth * 3, 3, 3, newWidth * 3);
  return data;
}

function makeWeights(size, newSize, support, weigh) {
  const scale = size / newSize;
  const stretch = Math.max(1, scale);
  return Array.from({ length: newSize }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support * stretch + 0.5));
    const end = Math.min(size, Math.trunc(centre + support * stretch + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) => weigh((i + first - centre + 0.5) * (1 / stretch)));
    const sum = weights.reduce((a, b) => a + b, 0);
    const whole = weights.map((w) => Math.trunc((sum === 0 ? w : w / sum) * 2 ** BITS + (w / (sum || 1) < 0 ? -0.5 : 0.5)));
    return [first, whole];
  });
}

// One pass along an edge: `step` bytes between neighbours of it and `line` between lines in the old picture.
function pass(data, weights, lines, length, step, line, newLine, newStep) {
  const made = new Uint8Array(lines * length * 3);
  for (let y = 0; y < lines; y += 1) {
    for (let x = 0; x < length; x += 1) {
      const [first, whole] = weights[x];
      for (let colour = 0; colour < 3; colour += 1) {
        let sum = 2 ** (BITS - 1);
        let at = y * line + first * step + colour;
        for (let i = 0; i < whole.length; i += 1, at += step) sum += data[at] * whole[i];
        made[y * newLine + x * newStep + colour] = Math.min(255, Math.max(0, sum >> BITS));
      }
    }
  }
  return made;
}

function pick(data, width, height, newWidth, newHeight) {
  const places = (size, newSize) => {
    const found = [];
    for (let i = 0, at = (size / newSize) * 0.5; i < newSize; i += 1, at += size / newSize) found.push(Math.floor(at));
    return found;
  };
  const columns = places(width, newWidth);
  return Uint8Array.from(places(height, newHeight).flatMap((y) => columns.flatMap((x) => [0, 1, 2].map((c) => data[3 * (y * width + x) + c]))));
}

// Cut from the middle; what a smaller picture lacks is black.
function crop(data, width, height, size) {
  const made = new Uint8Array(3 * size.width * size.height);
  const shift = (has, wanted) => (has >= wanted ? Math.floor((has - wanted) / 2) : -Math.floor((wanted - has + 1) / 2));
  const [left, top] = [shift(width, size.width), shift(height, size.height)];
  for (let y = 0; y < size.height; y += 1) {
    for (let x = 0; x < size.width; x += 1) {
      if (x + left < 0 || x + left >= width || y + top < 0 || y + top >= height) continue;
      for (let colour = 0; colour < 3; colour += 1) made[3 * (y * size.width + x) + colour] = data[3 * ((y + top) * width + x + left) + colour];
    }
  }
  return made;
}

// A data URL, or { width, height, data } of RGB, RGBA or gray bytes -> { width, height, data: RGB }.
export async function readPicture(image, library) {
  if (typeof image === "string") {
    const bytes = fromDataUrl(image);
    const isPng = bytes[0] === 0x89 && bytes[1] === 0x50;
    const found = (isPng && (await decodePng(bytes))) || (await decodeElsewhere(bytes, library));
    check(found);
    return found.upright ? toRgb(found) : turn(toRgb(found), readOrientation(bytes));
  }
  check(image ?? {});
  return toRgb(image);
}

function fromDataUrl(url) {
  const found = /^data:image\/[\w.+-]+;base64,/.exec(url);
  if (!found) throw new InputError("A picture must be a data URL, as data:image/png;base64,…");
  try {
    return Uint8Array.from(atob(url.slice(found[0].length)), (char) => char.charCodeAt(0));
  } catch {
    throw new InputError("This picture's data URL is damaged.");
  }
}

async function decodeElsewhere(bytes, library) {
  const blob = new Blob([bytes]);
  try {
    if (typeof createImageBitmap !== "function") return await library.RawImage.fromBlob(blob);
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
    canvas.drawImage(bitmap, 0, 0);
    const { width, height, data } = canvas.getImageData(0, 0, bitmap.width, bitmap.height);
    return { width, height, data, upright: true };
  } catch (error) {
    throw new InputError(`This picture cannot be read here (${error.message}). Save it as PNG and try again.`);
  }
}

function check({ width, height, data }) {
  const channels = data?.length / (width * height);
  if (![1, 3, 4].includes(channels)) throw new InputError("A picture must have a width, a height and bytes for each of its pixels.");
  if (width * height > MOST) throw new InputError(`A picture of ${width}×${height} pixels is too large: ${MOST} at most.`);
}

// Gray is repeated, an alpha channel dropped: the colours below it show.
function toRgb({ width, height, data }) {
  const channels = data.length / (width * height);
  if (channels === 3) return { width, height, data };
  const made = new Uint8Array(3 * width * height);
  for (let i = 0; i < width * height; i += 1) {
    for (let colour = 0; colour < 3; colour += 1) made[3 * i + colour] = data[channels * i + (channels === 1 ? 0 : colour)];
  }
  return { width, height, data: made };
}

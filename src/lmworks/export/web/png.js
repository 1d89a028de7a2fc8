// PNG to pixels (W3C, PNG Specification), and the way up that EXIF states.

const CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // by colour type

// { width, height, data: RGB } of a PNG; null of one in several passes, which is rare.
export async function decodePng(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const packed = [];
  let header = null, palette = null;
  for (let at = 8; at + 8 <= bytes.length; at += 12 + view.getUint32(at)) {
    const [length, type] = [view.getUint32(at), String.fromCharCode(...bytes.subarray(at + 4, at + 8))];
    const body = bytes.subarray(at + 8, at + 8 + length);
    if (type === "IHDR") header = { width: view.getUint32(at + 8), height: view.getUint32(at + 12), depth: body[8], type: body[9], passes: body[12] };
    if (type === "PLTE") palette = body;
    if (type === "IDAT") packed.push(body);
  }
  if (!header?.width || !header.height || header.width * header.height > 2 ** 28 || header.passes || !(header.type in CHANNELS)) return null;
  try {
    const unpacked = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
    const rows = unfilter(new Uint8Array(await new Response(unpacked).arrayBuffer()), header);
    return rows && toColours(rows, header, palette);
  } catch {
    return null; // a damaged one: whoever decodes it next says what is wrong
  }
}

function unfilter(raw, { width, height, depth, type }) {
  const across = Math.max(1, (CHANNELS[type] * depth) >> 3); // bytes to the pixel on the left
  const length = Math.ceil((width * CHANNELS[type] * depth) / 8);
  if (raw.length < height * (length + 1)) return null;
  const rows = [];
  let above = new Uint8Array(length);
  for (let y = 0; y < height; y += 1) {
    const filter = raw[y * (length + 1)];
    const row = raw.slice(y * (length + 1) + 1, (y + 1) * (length + 1));
    for (let i = 0; i < length; i += 1) {
      const [left, up, corner] = [i >= across ? row[i - across] : 0, above[i], i >= across ? above[i - across] : 0];
      if (filter === 1) row[i] += left;
      else if (filter === 2) row[i] += up;
      else if (filter === 3) row[i] += (left + up) >> 1;
      else if (filter === 4) row[i] += paeth(left, up, corner);
    }
    rows.push((above = row));
  }
  return rows;
}

function paeth(left, up, corner) {
  const [a, b, c] = [Math.abs(up - corner), Math.abs(left - corner), Math.abs(left + up - 2 * corner)];
  if (a <= b && a <= c) return left;
  return b <= c ? up : corner;
}

// Of 16 bits the upper 8 count; gray of 16 bits is cut at 255, as Pillow does.
function toColours(rows, { width, height, depth, type }, palette) {
  const data = new Uint8Array(3 * width * height);
  const channels = CHANNELS[type];
  const gray = channels < 3;
  rows.forEach((row, y) => {
    for (let x = 0; x < width; x += 1) {
      for (let colour = 0; colour < 3; colour += 1) {
        const place = x * channels + (gray ? 0 : colour);
        let value;
        if (depth === 16) value = type === 0 ? Math.min(255, row[2 * place] * 256 + row[2 * place + 1]) : row[2 * place];
        else if (depth === 8) value = row[place];
        else value = (row[(place * depth) >> 3] >> (8 - depth - ((place * depth) & 7))) & (2 ** depth - 1);
        if (type === 3) value = palette?.[3 * value + colour] ?? 0;
        else if (depth < 8) value *= 255 / (2 ** depth - 1);
        data[3 * (y * width + x) + colour] = value;
      }
    }
  });
  return { width, height, data };
}

// The EXIF orientation, 1 to 8, of a JPEG or a PNG; 1 where there is none.
export function readOrientation(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const named = (at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  try {
    if (bytes[0] === 0xff && bytes[1] === 0xd8) {
      for (let at = 2; bytes[at] === 0xff && bytes[at + 1] !== 0xda; at += 2 + view.getUint16(at + 2)) {
        if (bytes[at + 1] === 0xe1 && named(at + 4) === "Exif") return readTiff(view, at + 10);
      }
    } else if (bytes[0] === 0x89) {
      for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) if (named(at + 4) === "eXIf") return readTiff(view, at + 8);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // it ends early
  }
  return 1;
}

function readTiff(view, start) {
  const small = view.getUint16(start) === 0x4949; // little-endian
  const table = start + view.getUint32(start + 4, small);
  for (let i = 0; i < view.getUint16(table, small); i += 1) {
    const entry = table + 2 + 12 * i;
    if (view.getUint16(entry, small) === 0x0112) return view.getUint16(entry + 8, small);
  }
  return 1;
}

// Turn a picture of RGB upright.
export function turn({ width, height, data }, orientation) {
  if (!(orientation > 1 && orientation <= 8)) return { width, height, data };
  const swapped = orientation > 4;
  const [w, h] = swapped ? [height, width] : [width, height];
  const made = new Uint8Array(data.length);
  for (let y = 0; y < h; y += 1) {
    for (let x = 0; x < w; x += 1) {
      let [u, v] = swapped ? [y, x] : [x, y];
      if ([2, 3, 7, 8].includes(orientation)) u = width - 1 - u;
      if ([3, 4, 6, 7].includes(orientation)) v = height - 1 - v;
      for (let colour = 0; colour < 3; colour += 1) made[3 * (y * w + x) + colour] = data[3 * (v * width + u) + colour];
    }
  }
  return { width: w, height: h, data: made };
}

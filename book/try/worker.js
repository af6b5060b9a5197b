// Runs the exported graph off the page's thread: the page stays responsive, whatever the size of the photograph.
importScripts("ort.wasm.min.js");
ort.env.wasm.numThreads = 1; // more need headers that plain static hosting does not send
ort.env.wasm.wasmPaths = new URL("./", self.location).href;

const LARGEST = 24e6; // pixels; larger photographs are downsampled, with a notice
const NOTHING = 255; // id of pixels in no segment
const NEIGHBORS = 30, TEMPERATURE = 0.02; // of run.teach(..., method="neighbors")
let session, about, latest;

async function open() {
  about = await (await fetch("stego.json")).json();
  session = await ort.InferenceSession.create("stego.onnx", { executionProviders: ["wasm"] });
  return about;
}

// The EXIF orientation of a WebP, which browsers ignore, and the file without it, so that the browser does not rotate the image too.
function orientationOf(bytes) {
  const view = new DataView(bytes), text = (at) => String.fromCharCode(...new Uint8Array(bytes, at, 4));
  if (bytes.byteLength < 12 || text(0) != "RIFF" || text(8) != "WEBP") return 1;
  for (let at = 12; at + 8 <= bytes.byteLength; at += 8 + view.getUint32(at + 4, true) + (view.getUint32(at + 4, true) % 2)) {
    if (text(at) != "EXIF") continue;
    new Uint8Array(bytes, at, 4).fill(0x58); // an unknown chunk is skipped
    const start = at + 8 + (text(at + 8) == "Exif" ? 6 : 0), little = view.getUint16(start) == 0x4949;
    const table = start + view.getUint32(start + 4, little);
    for (let entry = 0; entry < view.getUint16(table, little); entry++) {
      const place = table + 2 + 12 * entry, value = view.getUint16(place + 8, little);
      if (view.getUint16(place, little) == 274 && value >= 1 && value <= 8) return value;
    }
  }
  return 1;
}

// What a stored pixel (x, y) of an image of w x h pixels becomes, by EXIF orientation.
const TURNS = {
  1: () => [1, 0, 0, 1, 0, 0], 2: (w) => [-1, 0, 0, 1, w, 0], 3: (w, h) => [-1, 0, 0, -1, w, h], 4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0], 6: (w, h) => [0, 1, -1, 0, h, 0], 7: (w, h) => [0, -1, -1, 0, h, w], 8: (w) => [0, -1, 1, 0, 0, w],
};

async function pixelsOf(file) {
  // As Python's reader: no color profile, EXIF applied, transparent pixels on white and in no segment.
  const bytes = await file.arrayBuffer();
  let orientation = 1;
  try { orientation = orientationOf(bytes); } catch { } // broken metadata do not matter for the pixels
  const image = await createImageBitmap(new Blob([bytes], { type: file.type }), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const originalSize = orientation < 5 ? [image.width, image.height] : [image.height, image.width];
  const scale = Math.min(1, Math.sqrt(LARGEST / (image.width * image.height)));
  const [width, height] = originalSize.map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [w, h] = orientation < 5 ? [width, height] : [height, width];
  context.setTransform(...TURNS[orientation](w, h));
  context.drawImage(image, 0, 0, w, h);
  const pixels = context.getImageData(0, 0, width, height), rgba = pixels.data;
  const rgb = new Uint8Array(3 * width * height), clear = new Uint8Array(width * height);
  for (let pixel = 0; pixel < clear.length; pixel++) {
    const alpha = rgba[4 * pixel + 3];
    clear[pixel] = alpha < 128;
    for (let channel = 0; channel < 3; channel++) {
      const value = clear[pixel] ? 255 : (rgba[4 * pixel + channel] * alpha + 255 * (255 - alpha)) / 255;
      rgb[3 * pixel + channel] = rgba[4 * pixel + channel] = Math.round(value);
    }
    rgba[4 * pixel + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return { rgb, clear, width, height, photograph: canvas.transferToImageBitmap(), downsampled: scale < 1, originalSize };
}

// For each pixel of a line: the two cells beside it, and the share of the second. Bilinear, ends repeated.
function between(cells, pixels) {
  const first = new Int32Array(pixels), second = new Int32Array(pixels), share = new Float32Array(pixels);
  for (let pixel = 0; pixel < pixels; pixel++) {
    const at = Math.max(0, ((pixel + 0.5) * cells) / pixels - 0.5);
    first[pixel] = Math.min(Math.floor(at), cells - 1);
    second[pixel] = Math.min(first[pixel] + 1, cells - 1);
    share[pixel] = at - first[pixel];
  }
  return { first, second, share };
}

// The id of the largest upsampled map at every pixel, NOTHING where the image is transparent. `onProgress`: called with the finished fraction.
function labelsOf(maps, ids, { h, w, height, width, clear }, onProgress = () => {}) {
  const clusters = ids.length;
  const rows = between(h, height), columns = between(w, width), labels = new Uint8Array(height * width);
  const line = new Float32Array(clusters * w);
  for (let y = 0; y < height; y++) {
    for (let cluster = 0; cluster < clusters; cluster++) {
      const a = (cluster * h + rows.first[y]) * w, b = (cluster * h + rows.second[y]) * w, t = rows.share[y];
      for (let x = 0; x < w; x++) line[cluster * w + x] = (1 - t) * maps[a + x] + t * maps[b + x];
    }
    for (let x = 0; x < width; x++) {
      const a = columns.first[x], b = columns.second[x], t = columns.share[x];
      let best = 0, most = -Infinity;
      for (let cluster = 0; cluster < clusters; cluster++) {
        const value = (1 - t) * line[cluster * w + a] + t * line[cluster * w + b];
        if (value > most) { most = value; best = cluster; }
      }
      labels[y * width + x] = clear[y * width + x] ? NOTHING : ids[best];
    }
    if (y % 500 == 499) onProgress(y / height);
  }
  return labels;
}

async function segment(file) {
  let image;
  try {
    image = await pixelsOf(file);
  } catch {
    throw new Error("The browser cannot read this file as an image. Choose a JPEG, PNG or WebP file.");
  }
  postMessage({ kind: "progress", text: `computing features of ${image.width} × ${image.height} pixels …` });
  const started = performance.now();
  const outputs = await session.run({ image: new ort.Tensor("uint8", image.rgb, [image.height, image.width, 3]) });
  const [, , h, w] = outputs.similarity.dims;
  const { width, height, clear, downsampled, originalSize, photograph } = image, maps = { features: unit(outputs.features.data, h * w), codes: unit(outputs.code.data, h * w) };
  latest = { h, w, height, width, clear, codes: maps.codes };
  const labels = labelsOf(outputs.similarity.data, about.ids, latest, (done) =>
    postMessage({ kind: "progress", text: `labeling pixels: ${Math.round(100 * done)} %` }),
  );
  const seconds = (performance.now() - started) / 1000;
  return { kind: "segments", labels, width, height, photograph, downsampled, originalSize, counts: countsOf(labels), seconds, h, w, maps };
}

function countsOf(labels) {
  const counts = new Float64Array(256);
  for (const id of labels) counts[id]++;
  return counts;
}

// Maps (C, cells) and the unit vectors of the cells, (cells, C).
function unit(maps, cells) {
  const channels = maps.length / cells, vectors = new Float32Array(maps.length);
  for (let cell = 0; cell < cells; cell++) {
    let square = 0;
    for (let channel = 0; channel < channels; channel++) square += maps[channel * cells + cell] ** 2;
    for (let channel = 0; channel < channels; channel++) vectors[cell * channels + channel] = maps[channel * cells + cell] / (Math.sqrt(square) || 1);
  }
  return { maps, vectors, channels };
}

// The code at a pixel, by bilinear interpolation, as a unit vector.
function codeAt({ x, y }) {
  const { h, w, height, width, codes: { maps, channels } } = latest, rows = between(h, height), columns = between(w, width);
  const s = rows.share[y], t = columns.share[x], at = (row, column) => row * w + column;
  const cells = [[rows.first[y], columns.first[x], (1 - s) * (1 - t)], [rows.first[y], columns.second[x], (1 - s) * t], [rows.second[y], columns.first[x], s * (1 - t)], [rows.second[y], columns.second[x], s * t]];
  const code = Float32Array.from({ length: channels }, (_, channel) => cells.reduce((sum, [row, column, part]) => sum + part * maps[channel * h * w + at(row, column)], 0));
  return unit(code, 1).vectors;
}

// The segments that clicks {x, y, name} describe: at each cell the nearest clicks vote for their names, by softmax of cosine / TEMPERATURE.
function taught(clicks, names) {
  const { h, w, codes: { vectors, channels } } = latest, cells = h * w, scores = new Float32Array(names * cells), points = clicks.map(codeAt);
  for (let cell = 0; cell < cells; cell++) {
    const cosines = points.map((point) => point.reduce((sum, value, channel) => sum + value * vectors[cell * channels + channel], 0));
    const nearest = [...cosines.keys()].sort((a, b) => cosines[b] - cosines[a]).slice(0, NEIGHBORS);
    const votes = nearest.map((click) => Math.exp((cosines[click] - cosines[nearest[0]]) / TEMPERATURE)), sum = votes.reduce((a, b) => a + b);
    nearest.forEach((click, rank) => (scores[clicks[click].name * cells + cell] += votes[rank] / sum));
  }
  for (let at = 0; at < scores.length; at++) scores[at] = Math.log(Math.max(scores[at], 1e-4));
  const labels = labelsOf(scores, [...Array(names).keys()], latest);
  return { kind: "taught", clicks: clicks.length, labels, counts: countsOf(labels), scores };
}

onmessage = async ({ data }) => {
  try {
    if (data.clicks) postMessage(taught(data.clicks, data.names));
    else postMessage(data.file ? await segment(data.file) : { kind: "ready", about: await open() });
  } catch (error) {
    postMessage({ kind: "error", text: error.message || String(error) });
  }
};

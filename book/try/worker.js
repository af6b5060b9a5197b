// Runs the exported graph off the page's thread: the page stays responsive, whatever the size of the photograph.
importScripts("ort.wasm.min.js");
ort.env.wasm.numThreads = 1; // more need headers that plain static hosting does not send
ort.env.wasm.wasmPaths = new URL("./", self.location).href;

const LARGEST = 24e6; // pixels; a larger photograph is made smaller, with a word
let session, about;

async function open() {
  about = await (await fetch("stego.json")).json();
  session = await ort.InferenceSession.create("stego.onnx", { executionProviders: ["wasm"] });
  return about;
}

async function pixelsOf(file) {
  // The colors and the upright orientation that Python's reader takes: no color profile, EXIF applied.
  const image = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const scale = Math.min(1, Math.sqrt(LARGEST / (image.width * image.height)));
  const width = Math.max(1, Math.round(image.width * scale)), height = Math.max(1, Math.round(image.height * scale));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  const rgba = context.getImageData(0, 0, width, height).data;
  const rgb = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    rgb[to++] = rgba[from]; rgb[to++] = rgba[from + 1]; rgb[to++] = rgba[from + 2];
  }
  return { rgb, width, height, smaller: scale < 1, asked: [image.width, image.height] };
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

// The id of the largest upsampled similarity at every pixel. `tell`: takes the finished share.
function labelsOf(maps, clusters, h, w, height, width, tell) {
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
      labels[y * width + x] = about.ids[best];
    }
    if (y % 500 == 499) tell(y / height);
  }
  return labels;
}

// Label map as a PNG: each pixel's gray value is its id.
async function pngOf(labels, width, height) {
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < labels.length; pixel++) {
    image.data.fill(labels[pixel], 4 * pixel, 4 * pixel + 3);
    image.data[4 * pixel + 3] = 255;
  }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

async function segment(file) {
  let image;
  try {
    image = await pixelsOf(file);
  } catch {
    throw new Error("This file is no photograph that the browser can read. Take a JPEG, a PNG or a WebP.");
  }
  postMessage({ kind: "progress", text: `computing features of ${image.width} × ${image.height} pixels …` });
  const started = performance.now();
  const found = await session.run({ image: new ort.Tensor("uint8", image.rgb, [image.height, image.width, 3]) });
  const [, clusters, h, w] = found.similarity.dims;
  const labels = labelsOf(found.similarity.data, clusters, h, w, image.height, image.width, (done) =>
    postMessage({ kind: "progress", text: `labeling pixels: ${Math.round(100 * done)} %` }),
  );
  const seconds = (performance.now() - started) / 1000;
  const counts = new Float64Array(256);
  for (const id of labels) counts[id]++;
  const png = await pngOf(labels, image.width, image.height);
  const { width, height, smaller, asked } = image;
  return {
    kind: "segments", labels, width, height, smaller, asked, counts, seconds, png, h, w,
    maps: { features: found.features.data, codes: found.code.data },
  };
}

onmessage = async ({ data }) => {
  try {
    postMessage(data.file ? await segment(data.file) : { kind: "ready", about: await open() });
  } catch (error) {
    postMessage({ kind: "error", text: error.message || String(error) });
  }
};

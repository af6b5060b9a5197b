// "Try it": the page's side. The worker computes; here are the photograph, the colors, the legend and the point.
(() => {
  const root = document.getElementById("try"), files = root.dataset.files, find = (name) => root.querySelector(`[data-part="${name}"]`);
  const say = (text, wrong) => { find("message").textContent = text; find("message").classList.toggle("wrong", Boolean(wrong)); };
  const state = { about: null, result: null, photograph: null, unit: null };
  root.stego = state; // for tests

  if (typeof WebAssembly !== "object" || typeof Worker !== "function" || typeof OffscreenCanvas !== "function") {
    say("This browser lacks WebAssembly, workers or off-screen canvases, so it cannot run the network. A newer one can.", true);
    return;
  }
  const base = new URL(files, location.href);
  if (base.protocol === "file:") {
    say("A page opened as a file may not start the network. Serve the book (make serve), or open it on a web site.", true);
    return;
  }
  const worker = new Worker(new URL("worker.js", base));
  worker.onerror = () => say("The network could not be loaded. Is the folder of this page complete?", true);
  worker.onmessage = ({ data }) => ({ ready, progress: (one) => say(one.text), segments, error: (one) => { busy(false); say(one.text, true); } })[data.kind](data);
  say("loading the network (about 20 MB, once) …");
  worker.postMessage({});

  function busy(on) { root.setAttribute("aria-busy", on); for (const input of root.querySelectorAll("[data-input]")) input.disabled = on; }

  function ready({ about }) {
    state.about = about;
    busy(false);
    say("Choose a photograph, drop one here, or take a sample. Nothing leaves this machine.");
  }

  function open(file) {
    if (!state.about || root.getAttribute("aria-busy") === "true") return;
    busy(true);
    say("reading …");
    worker.postMessage({ file });
  }

  async function segments(result) {
    state.result = result;
    state.unit = null;
    state.photograph = await createImageBitmap(result.photograph, { resizeWidth: Math.min(Math.max(result.width, 640), 1200), resizeQuality: "high" });
    busy(false);
    const notice = result.smaller ? ` It was made smaller, from ${result.asked.join(" × ")}.` : "";
    say(`${result.width} × ${result.height} pixels in ${result.seconds.toFixed(1)} seconds, on this machine.${notice}`);
    find("results").hidden = false;
    const link = find("download");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(result.png);
    legend();
    draw();
    hint();
  }

  function legend() {
    const { counts } = state.result, list = find("legend");
    const { names, colors } = state.about, total = names.reduce((sum, _, id) => sum + counts[id], 0);
    list.replaceChildren(...[...names.keys()].filter((id) => counts[id]).sort((a, b) => counts[b] - counts[a]).map((id) => {
      const item = document.createElement("li"), swatch = document.createElement("span");
      swatch.style.background = `rgb(${colors[id].join(",")})`;
      item.append(swatch, `${names[id]}: ${((100 * counts[id]) / total).toFixed(1)} %`);
      return item;
    }));
  }

  // The photograph, and over it the colors of the segments; the canvas has the size at which the photograph is shown.
  function draw() {
    const { labels, width, height } = state.result, { colors } = state.about, canvas = find("segments");
    canvas.width = state.photograph.width;
    canvas.height = Math.max(1, Math.round((canvas.width * height) / width));
    const context = canvas.getContext("2d");
    context.drawImage(state.photograph, 0, 0, canvas.width, canvas.height);
    const image = context.getImageData(0, 0, canvas.width, canvas.height), opacity = find("opacity").value / 100;
    for (let y = 0, at = 0; y < canvas.height; y++) {
      const line = Math.floor(((y + 0.5) * height) / canvas.height) * width;
      for (let x = 0; x < canvas.width; x++, at += 4) {
        const color = colors[labels[line + Math.floor(((x + 0.5) * width) / canvas.width)]];
        if (color) for (let channel = 0; channel < 3; channel++) image.data[at + channel] = (1 - opacity) * image.data[at + channel] + opacity * color[channel];
      }
    }
    context.putImageData(image, 0, 0);
  }

  // Unit vectors of all grid cells, (h w, C), of the features or the codes.
  function unit() {
    const { maps, h, w } = state.result, space = find("space").value, values = maps[space], cells = h * w, channels = values.length / cells;
    if (state.unit?.space === space) return state.unit;
    const vectors = new Float32Array(values.length);
    for (let cell = 0; cell < cells; cell++) {
      let length = 0;
      for (let channel = 0; channel < channels; channel++) length += values[channel * cells + cell] ** 2;
      for (let channel = 0; channel < channels; channel++) vectors[cell * channels + channel] = values[channel * cells + cell] / (Math.sqrt(length) || 1);
    }
    return (state.unit = { space, vectors, channels });
  }

  function hint() {
    const canvas = find("correspondences");
    canvas.width = find("segments").width;
    canvas.height = find("segments").height;
    point(Math.floor(state.result.h / 2), Math.floor(state.result.w / 2));
  }

  // Correspondence of one cell with all: bright where the cosine is high.
  function point(row, column) {
    const { h, w } = state.result, { vectors, channels } = unit(), canvas = find("correspondences");
    const small = new ImageData(w, h), cosines = new Float32Array(h * w), from = (row * w + column) * channels;
    for (let cell = 0; cell < h * w; cell++) {
      let cosine = 0;
      for (let channel = 0; channel < channels; channel++) cosine += vectors[from + channel] * vectors[cell * channels + channel];
      cosines[cell] = cosine;
      const t = Math.max(0, cosine); // black, purple, orange, yellow
      small.data.set([255 * Math.min(1, 1.6 * t), 255 * Math.max(0, 1.5 * t - 0.5), 255 * Math.max(0, 0.5 - Math.abs(t - 0.35)), 255], 4 * cell);
    }
    const map = new OffscreenCanvas(w, h);
    map.getContext("2d").putImageData(small, 0, 0);
    const context = canvas.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(state.photograph, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 0.75;
    context.drawImage(map, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    context.strokeStyle = "white";
    context.lineWidth = Math.max(2, canvas.width / 300);
    context.strokeRect((column * canvas.width) / w, (row * canvas.height) / h, canvas.width / w, canvas.height / h);
    Object.assign(state, { cell: [row, column], cosines });
  }

  function follow(event) {
    if (!state.result) return;
    const canvas = find("correspondences"), box = canvas.getBoundingClientRect(), { h, w } = state.result;
    const at = (part, cells) => Math.min(cells - 1, Math.max(0, Math.floor(part * cells)));
    point(at((event.clientY - box.top) / box.height, h), at((event.clientX - box.left) / box.width, w));
  }

  function keys(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !state.result) return;
    event.preventDefault();
    const { h, w } = state.result, [row, column] = state.cell;
    point(Math.min(h - 1, Math.max(0, row + step[0])), Math.min(w - 1, Math.max(0, column + step[1])));
  }

  function show(tab) {
    for (const name of ["segments", "correspondences"]) {
      find(`panel-${name}`).hidden = name !== tab;
      find(`tab-${name}`).setAttribute("aria-selected", name === tab);
    }
  }

  async function camera() {
    const video = find("video");
    if (video.srcObject) {
      const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
      canvas.getContext("2d").drawImage(video, 0, 0);
      for (const track of video.srcObject.getTracks()) track.stop();
      video.srcObject = null;
      video.hidden = true;
      find("camera").textContent = "Camera";
      return open(await canvas.convertToBlob({ type: "image/png" }));
    }
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      video.hidden = false;
      find("camera").textContent = "Take the photograph";
    } catch {
      say("There is no camera that this page may use. Choose a file instead.", true);
    }
  }

  find("file").addEventListener("change", (event) => { if (event.target.files[0]) open(event.target.files[0]); event.target.value = ""; });
  find("camera").addEventListener("click", camera);
  for (const sample of root.querySelectorAll("[data-sample]"))
    sample.addEventListener("click", async () => open(await (await fetch(new URL(sample.dataset.sample, base))).blob()));
  root.addEventListener("dragover", (event) => event.preventDefault());
  root.addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]); });
  find("opacity").addEventListener("input", draw);
  find("space").addEventListener("change", () => point(...state.cell));
  find("correspondences").addEventListener("pointermove", follow);
  find("correspondences").addEventListener("pointerdown", follow);
  find("correspondences").addEventListener("keydown", keys);
  for (const name of ["segments", "correspondences"]) find(`tab-${name}`).addEventListener("click", () => show(name));
})();

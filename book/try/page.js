// "Try it": the page's side. The worker computes; this file handles the photograph, the colors, the legend and the clicks.
(() => {
  const root = document.getElementById("try"), files = root.dataset.files, find = (name) => root.querySelector(`[data-part="${name}"]`);
  const say = (text, wrong) => { find("message").textContent = text; find("message").classList.toggle("wrong", Boolean(wrong)); };
  const COLORS = [[230, 159, 0], [0, 114, 178], [204, 121, 167]]; // of the user's names, colorblind-safe
  const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const names = [...root.querySelectorAll("[data-name]")], choices = [...root.querySelectorAll("[data-choice]")];
  const state = { about: null, result: null, photograph: null, tab: "segments", clicks: [], taught: null };
  root.stego = state; // for tests

  if (typeof WebAssembly !== "object" || typeof Worker !== "function" || typeof OffscreenCanvas !== "function") {
    say("This browser lacks WebAssembly, workers or off-screen canvases. Use a newer browser.", true);
    return;
  }
  const base = new URL(files, location.href);
  if (base.protocol === "file:") {
    say("A page opened as a file cannot run the network. Serve the book (make serve), or open it on a website.", true);
    return;
  }
  const worker = new Worker(new URL("worker.js", base));
  worker.onerror = () => say("The network could not be loaded. Check that the folder of this page is complete.", true);
  worker.onmessage = ({ data }) => ({ ready, progress: (one) => say(one.text), segments, taught, error: (one) => { busy(false); say(one.text, true); } })[data.kind](data);
  say("loading the network (about 20 MB, once) …");
  worker.postMessage({});

  function busy(on) { root.setAttribute("aria-busy", on); for (const input of root.querySelectorAll("[data-input]")) input.disabled = on; }

  function ready({ about }) {
    state.about = about;
    busy(false);
    say("Choose a photograph, drop one here, or pick a sample. Nothing leaves this device.");
  }

  function open(file) {
    if (!state.about || root.getAttribute("aria-busy") === "true") return;
    busy(true);
    say("reading …");
    worker.postMessage({ file });
  }

  async function segments(result) {
    const middle = [Math.floor(result.h / 2), Math.floor(result.w / 2)];
    Object.assign(state, { result, clicks: [], taught: null, cell: middle, cursor: middle });
    state.photograph = await createImageBitmap(result.photograph, { resizeWidth: Math.min(Math.max(result.width, 640), 1200), resizeQuality: "high" });
    busy(false);
    const notice = result.downsampled ? ` Downsampled from ${result.originalSize.join(" × ")}.` : "";
    say(`${result.width} × ${result.height} pixels in ${result.seconds.toFixed(1)} seconds, on this device.${notice}`);
    find("results").hidden = false;
    show(state.tab);
  }

  // Label map, names and colors of the tab.
  function shown() {
    if (state.tab !== "taught") return { ...state.result, ...state.about, canvas: find("segments") };
    return { ...state.taught, names: names.map((input, id) => input.value.trim() || `name ${id + 1}`), colors: COLORS, canvas: find("taught") };
  }

  function legend() {
    const { counts, names, colors } = shown(), ids = counts ? [...names.keys()].filter((id) => counts[id]) : [];
    const total = ids.reduce((sum, id) => sum + counts[id], 0);
    find("legend").replaceChildren(...ids.sort((a, b) => counts[b] - counts[a]).map((id) => {
      const item = document.createElement("li"), swatch = document.createElement("span");
      swatch.style.background = `rgb(${colors[id].join(",")})`;
      item.append(swatch, `${names[id]}: ${((100 * counts[id]) / total).toFixed(1)} %`);
      return item;
    }));
  }

  function size(canvas) {
    canvas.width = state.photograph.width;
    canvas.height = Math.max(1, Math.round((canvas.width * state.result.height) / state.result.width));
    return canvas.getContext("2d");
  }

  // The photograph, and over it the colors of the segments; the canvas has the size at which the photograph is shown.
  function draw() {
    const { width, height } = state.result, { labels, colors, canvas } = shown(), context = size(canvas);
    context.drawImage(state.photograph, 0, 0, canvas.width, canvas.height);
    const image = context.getImageData(0, 0, canvas.width, canvas.height), opacity = find("opacity").value / 100;
    for (let y = 0, at = 0; labels && y < canvas.height; y++) {
      const line = Math.floor(((y + 0.5) * height) / canvas.height) * width;
      for (let x = 0; x < canvas.width; x++, at += 4) {
        const color = colors[labels[line + Math.floor(((x + 0.5) * width) / canvas.width)]];
        if (color) for (let channel = 0; channel < 3; channel++) image.data[at + channel] = (1 - opacity) * image.data[at + channel] + opacity * color[channel];
      }
    }
    context.putImageData(image, 0, 0);
    if (state.tab === "taught") marks(canvas, context);
  }

  // The clicks, with the numbers of their names, and the cell that the keyboard has marked.
  function marks(canvas, context) {
    const { width, height, h, w } = state.result, radius = (10 * canvas.width) / (canvas.clientWidth || canvas.width);
    Object.assign(context, { textAlign: "center", textBaseline: "middle", font: `bold ${1.4 * radius}px sans-serif`, lineWidth: radius / 5, strokeStyle: "white" });
    for (const { x, y, name } of state.clicks) {
      const place = [((x + 0.5) * canvas.width) / width, ((y + 0.5) * canvas.height) / height];
      context.beginPath();
      context.arc(...place, radius, 0, 2 * Math.PI);
      context.fillStyle = `rgb(${COLORS[name].join(",")})`;
      context.fill();
      context.stroke();
      context.fillStyle = name === 1 ? "white" : "black";
      context.fillText(name + 1, ...place);
    }
    if (canvas.matches(":focus-visible")) frame(canvas, context, state.cursor, h, w);
  }

  function frame(canvas, context, [row, column], h, w) {
    context.strokeStyle = "white";
    context.lineWidth = Math.max(2, canvas.width / 300);
    context.strokeRect((column * canvas.width) / w, (row * canvas.height) / h, canvas.width / w, canvas.height / h);
  }

  // Asks for the segments that the clicks describe.
  function teach() {
    const count = new Set(state.clicks.map((click) => click.name)).size;
    if (count < 2) state.taught = null;
    else worker.postMessage({ clicks: state.clicks, names: names.length });
    find("clicks").textContent = count < 2 ? "Click on places of at least two names." : `${state.clicks.length} clicks`;
    for (const name of ["undo", "clear"]) find(name).disabled = !state.clicks.length;
    update();
  }

  function taught(result) {
    if (result.clicks !== state.clicks.length) return; // a newer request is pending
    state.taught = result;
    update();
  }

  function update() {
    find("map").hidden = !shown().labels;
    legend();
    draw();
  }

  function label(x, y) {
    if (!state.result || root.getAttribute("aria-busy") === "true") return;
    state.clicks.push({ x, y, name: choices.findIndex((choice) => choice.checked) });
    teach();
  }

  function undo() { state.clicks.pop(); teach(); }

  function clear() { state.clicks = []; teach(); }

  // A PNG whose gray values are the ids of the label map.
  async function download() {
    const { width, height } = state.result, { labels } = shown(), image = new ImageData(width, height), link = document.createElement("a");
    for (let pixel = 0; pixel < labels.length; pixel++) image.data.fill(labels[pixel], 4 * pixel, 4 * pixel + 3)[4 * pixel + 3] = 255;
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").putImageData(image, 0, 0);
    link.href = URL.createObjectURL(await canvas.convertToBlob({ type: "image/png" }));
    link.download = "segments.png";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  // Correspondence of one cell with all: bright where the cosine is high.
  function point(row, column) {
    const { h, w, maps } = state.result, { vectors, channels } = maps[find("space").value], canvas = find("correspondences");
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
    const context = size(canvas);
    context.drawImage(state.photograph, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 0.75;
    context.drawImage(map, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    frame(canvas, context, [row, column], h, w);
    Object.assign(state, { cell: [row, column], cosines });
  }

  // Row and column of a pointer in a grid over a canvas.
  function place(event, rows, columns) {
    const box = event.target.getBoundingClientRect(), at = (part, count) => Math.min(count - 1, Math.max(0, Math.floor(part * count)));
    return [at((event.clientY - box.top) / box.height, rows), at((event.clientX - box.left) / box.width, columns)];
  }

  function follow(event) { if (state.result) point(...place(event, state.result.h, state.result.w)); }

  // The cell beside another one, in the direction of an arrow key.
  function moved(event, [row, column]) {
    const [down, right] = ARROWS[event.key], { h, w } = state.result;
    event.preventDefault();
    return [Math.min(h - 1, Math.max(0, row + down)), Math.min(w - 1, Math.max(0, column + right))];
  }

  function keys(event) { if (state.result && event.key in ARROWS) point(...moved(event, state.cell)); }

  function click(event) {
    const [y, x] = place(event, state.result.height, state.result.width);
    label(x, y);
  }

  function labelKeys(event) {
    const { key } = event, { width, height, h, w } = state.result;
    if (key in ARROWS) state.cursor = moved(event, state.cursor);
    else if (choices[key - 1]) choices[key - 1].checked = true;
    else if (key === "Enter" || key === " ") label(Math.floor(((state.cursor[1] + 0.5) * width) / w), Math.floor(((state.cursor[0] + 0.5) * height) / h));
    else if (key === "Backspace" || (key === "z" && (event.ctrlKey || event.metaKey))) undo();
    else return;
    event.preventDefault();
    draw();
  }

  function show(tab) {
    state.tab = tab;
    for (const name of ["segments", "taught", "correspondences"]) {
      find(`panel-${name}`).hidden = name !== tab;
      find(`tab-${name}`).setAttribute("aria-selected", name === tab);
    }
    if (tab === "taught") return teach();
    update();
    find("map").hidden = tab !== "segments";
    point(...state.cell);
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
      say("No camera is available. Choose a file instead.", true);
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
  for (const name of ["segments", "taught", "correspondences"]) find(`tab-${name}`).addEventListener("click", () => show(name));
  find("taught").addEventListener("click", click);
  find("taught").addEventListener("keydown", labelKeys);
  for (const event of ["focus", "blur"]) find("taught").addEventListener(event, draw);
  names.forEach((input, id) => {
    input.style.borderLeft = `0.8rem solid rgb(${COLORS[id].join(",")})`;
    input.addEventListener("input", legend);
    input.addEventListener("focus", () => (choices[id].checked = true));
  });
  for (const [name, action] of Object.entries({ undo, clear, download })) find(name).addEventListener("click", action);
})();

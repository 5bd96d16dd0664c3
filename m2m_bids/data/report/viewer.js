"use strict";
// Three orthogonal slices of a T1w with an image over it, on 2-D canvases: no library, no WebGL.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const size = data.shape; // voxels to the right, anterior and superior
  const strides = [1, size[0], size[0] * size[1]];
  // Axes across, up and through, and the sides of the slice: left, right, top, bottom.
  const planes = [
    {name: "Axial", axes: [0, 1, 2], sides: "LRAP"},
    {name: "Coronal", axes: [0, 2, 1], sides: "LRSI"},
    {name: "Sagittal", axes: [1, 2, 0], sides: "PASI"},
  ];
  const byId = (id) => document.getElementById(id);
  const at = size.map((n) => Math.floor(n / 2));
  const view = {state: data.states.length - 1, opacity: 0.6, gain: 1, crosshair: true, hidden: false};
  const volumes = {};

  function element(tag, attributes, parent, text) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.append(text);
    parent.append(made);
    return made;
  }

  async function decode(source) {
    // An atlas: axial slices from the lowest, in rows of `data.columns`.
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    const volume = new Uint8Array(size[0] * size[1] * size[2]);
    let voxel = 0;
    for (let k = 0; k < size[2]; k++) {
      const left = (k % data.columns) * size[0];
      const top = Math.floor(k / data.columns) * size[1];
      for (let j = 0; j < size[1]; j++) {
        let pixel = 4 * ((top + j) * image.width + left);
        for (let i = 0; i < size[0]; i++, pixel += 4) volume[voxel++] = pixels[pixel];
      }
    }
    return volume;
  }

  function sliceOf(volume, plane) {
    // Values of a slice, its top row the highest.
    const [across, up, through] = plane.axes;
    const values = new Uint8Array(size[across] * size[up]);
    let n = 0;
    for (let row = size[up] - 1; row >= 0; row--) {
      let voxel = row * strides[up] + at[through] * strides[through];
      for (let column = 0; column < size[across]; column++, voxel += strides[across]) {
        values[n++] = volume[voxel];
      }
    }
    return values;
  }

  function blend(plane) {
    // Voxels of the T1w with the image over it.
    const below = sliceOf(volumes.t1w, plane);
    const above = sliceOf(volumes.states[view.state], plane);
    const alpha = view.hidden ? 0 : view.opacity;
    const pixels = plane.pixels.data;
    for (let n = 0; n < below.length; n++) {
      const color = 3 * Math.min(255, Math.round(above[n] * view.gain));
      for (let channel = 0; channel < 3; channel++) {
        pixels[4 * n + channel] = (1 - alpha) * below[n] + alpha * data.colors[color + channel];
      }
      pixels[4 * n + 3] = 255;
    }
    plane.voxels.getContext("2d").putImageData(plane.pixels, 0, 0);
  }

  function outline(context, labels, members, [width, height], scale) {
    // Marching squares at one half, between the centres of voxels.
    const inside = (x, y) => members.includes(labels[y * width + x]);
    const ends = {
      1: ["lb"], 2: ["br"], 3: ["lr"], 4: ["tr"], 5: ["lt", "br"], 6: ["tb"], 7: ["lt"],
      8: ["lt"], 9: ["tb"], 10: ["tr", "lb"], 11: ["tr"], 12: ["lr"], 13: ["br"], 14: ["lb"],
    };
    context.beginPath();
    for (let y = 0; y < height - 1; y++) {
      for (let x = 0; x < width - 1; x++) {
        const corners = 8 * inside(x, y) + 4 * inside(x + 1, y) + 2 * inside(x + 1, y + 1)
          + inside(x, y + 1);
        for (const pair of ends[corners] || []) {
          const edge = {t: [x + 1, y + 0.5], b: [x + 1, y + 1.5], l: [x + 0.5, y + 1], r: [x + 1.5, y + 1]};
          context.moveTo(edge[pair[0]][0] * scale, edge[pair[0]][1] * scale);
          context.lineTo(edge[pair[1]][0] * scale, edge[pair[1]][1] * scale);
        }
      }
    }
    context.stroke();
  }

  function drawCrosshair(context, plane, scale) {
    const [across, up] = plane.axes;
    const x = (at[across] + 0.5) * scale;
    const y = (size[up] - at[up] - 0.5) * scale;
    const gap = 5 * window.devicePixelRatio;
    context.strokeStyle = "#ffd23c";
    context.lineWidth = window.devicePixelRatio;
    context.beginPath();
    context.moveTo(0, y); context.lineTo(x - gap, y);
    context.moveTo(x + gap, y); context.lineTo(plane.canvas.width, y);
    context.moveTo(x, 0); context.lineTo(x, y - gap);
    context.moveTo(x, y + gap); context.lineTo(x, plane.canvas.height);
    context.stroke();
  }

  function drawSides(context, plane) {
    const {width, height} = plane.canvas;
    const pixel = window.devicePixelRatio;
    context.font = `bold ${14 * pixel}px sans-serif`;
    context.lineWidth = 3 * pixel;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    context.textBaseline = "middle";
    const places = [["left", 4 * pixel, height / 2], ["right", width - 4 * pixel, height / 2],
      ["center", width / 2, 11 * pixel], ["center", width / 2, height - 10 * pixel]];
    places.forEach(([align, x, y], n) => {
      context.textAlign = align;
      context.strokeText(plane.sides[n], x, y);
      context.fillText(plane.sides[n], x, y);
    });
  }

  function draw() {
    for (const plane of planes) {
      const [across, up, through] = plane.axes;
      const context = plane.canvas.getContext("2d");
      const scale = plane.canvas.width / size[across];
      blend(plane);
      context.clearRect(0, 0, plane.canvas.width, plane.canvas.height);
      context.imageSmoothingQuality = "high";
      context.drawImage(plane.voxels, 0, 0, plane.canvas.width, plane.canvas.height);
      const labels = sliceOf(volumes.labels, plane);
      data.outlines.filter((_, n) => byId(`outline${n}`).checked).forEach(({color, members}) => {
        context.strokeStyle = color;
        context.lineWidth = 1.2 * window.devicePixelRatio;
        outline(context, labels, members, [size[across], size[up]], scale);
      });
      if (view.crosshair) drawCrosshair(context, plane, scale);
      drawSides(context, plane);
      plane.slider.value = at[through];
      plane.slider.setAttribute("aria-valuetext", `slice ${at[through] + 1} of ${size[through]}`);
    }
    byId("position").textContent = positionText();
  }

  function positionText() {
    const mm = data.affine.slice(0, 3).map(
      (row) => Math.round(row[0] * at[0] + row[1] * at[1] + row[2] * at[2] + row[3])
    );
    const voxel = at.reduce((sum, index, axis) => sum + index * strides[axis], 0);
    const value = data.window[0]
      + (volumes.states[view.state][voxel] / 255) * (data.window[1] - data.window[0]);
    return `x = ${mm[0]}, y = ${mm[1]}, z = ${mm[2]} mm; ${data.label} about ${Number(value.toPrecision(3))}`
      + (value >= data.window[1] ? " or more" : "");
  }

  let isWaiting = false;
  function update() {
    // Many events may come before the next frame is drawn.
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => { isWaiting = false; draw(); });
  }

  function move(axis, index) {
    at[axis] = Math.max(0, Math.min(size[axis] - 1, index));
    update();
  }

  function fit() {
    // Side by side at one scale where the window is wide, else each as wide as the window.
    const room = byId("panels").clientWidth;
    const widths = planes.map((plane) => size[plane.axes[0]]);
    const tallest = Math.max(...planes.map((plane) => size[plane.axes[1]]));
    const isWide = room >= 720;
    const sum = widths[0] + widths[1] + widths[2];
    const shared = Math.min((room - 24) / sum, Math.max(220, window.innerHeight - 250) / tallest);
    planes.forEach((plane, n) => {
      const scale = isWide ? shared : Math.min((room - 2) / widths[n], 2.4 * 1.5);
      const [width, height] = [widths[n] * scale, size[plane.axes[1]] * scale];
      plane.canvas.style.width = `${width}px`;
      plane.canvas.style.height = `${height}px`;
      plane.canvas.width = Math.round(width * window.devicePixelRatio);
      plane.canvas.height = Math.round(height * window.devicePixelRatio);
    });
    draw();
  }

  function onKey(event, plane) {
    const [across, up, through] = plane.axes;
    const steps = {
      ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowUp: [up, 1], ArrowDown: [up, -1],
      PageUp: [through, 1], PageDown: [through, -1],
    };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    move(step[0], at[step[0]] + (event.shiftKey ? 5 : 1) * step[1]);
  }

  function point(event, plane) {
    const box = plane.canvas.getBoundingClientRect();
    const [across, up] = plane.axes;
    move(across, Math.floor((size[across] * (event.clientX - box.left)) / box.width));
    move(up, size[up] - 1 - Math.floor((size[up] * (event.clientY - box.top)) / box.height));
  }

  function addPanel(plane) {
    const [across, up, through] = plane.axes;
    const figure = element("figure", {}, byId("panels"));
    plane.canvas = element("canvas", {
      "tabindex": "0", "role": "application", "id": plane.name.toLowerCase(),
      "aria-label": `${plane.name} slice of the ${data.target} with the ${data.label}. Arrow keys move the `
        + "cross-hair, Page Up and Page Down go through the slices.",
    }, figure);
    const label = element("label", {}, figure, plane.name);
    plane.slider = element("input", {type: "range", min: 0, max: size[through] - 1, step: 1}, label);
    plane.slider.addEventListener("input", () => move(through, Number(plane.slider.value)));
    plane.voxels = document.createElement("canvas");
    plane.voxels.width = size[across];
    plane.voxels.height = size[up];
    plane.pixels = new ImageData(size[across], size[up]);
    plane.canvas.addEventListener("keydown", (event) => onKey(event, plane));
    plane.canvas.addEventListener("pointerdown", (event) => {
      plane.canvas.setPointerCapture(event.pointerId);
      point(event, plane);
    });
    plane.canvas.addEventListener("pointermove", (event) => { if (event.buttons) point(event, plane); });
    plane.canvas.addEventListener("wheel", (event) => {
      // Who scrolls past in the report is not held up.
      if (document.activeElement !== plane.canvas) return;
      event.preventDefault();
      move(through, at[through] - Math.sign(event.deltaY));
    }, {passive: false});
  }

  function choose(n) {
    view.state = n;
    view.hidden = false;
    byId(`state${n}`).checked = true;
    update();
  }

  function addControls() {
    data.states.forEach((state, n) => {
      const label = element("label", {}, byId("states"));
      const radio = element("input", {type: "radio", name: "state", id: `state${n}`}, label);
      radio.addEventListener("change", () => choose(n));
      label.append(state.title);
    });
    data.outlines.forEach((line, n) => {
      const label = element("label", {style: `color: ${line.color}`}, byId("outlines"));
      const box = element("input", {type: "checkbox", id: `outline${n}`}, label);
      box.checked = line.is_shown;
      box.addEventListener("change", update);
      label.append(line.name);
    });
    for (const [id, use] of [
      ["opacity", (percent) => { view.opacity = percent / 100; view.hidden = false; }],
      ["brightness", (percent) => { view.gain = percent / 100; }],
    ]) {
      const show = () => {
        use(Number(byId(id).value));
        document.querySelector(`output[for=${id}]`).textContent = `${byId(id).value} %`;
      };
      byId(id).addEventListener("input", () => { show(); update(); });
      show();
    }
    byId("crosshair").addEventListener("change", (event) => { view.crosshair = event.target.checked; update(); });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || !/^[0-9]$/.test(event.key)) return;
      if (event.key === "0") { view.hidden = !view.hidden; update(); }
      else if (Number(event.key) <= data.states.length) choose(Number(event.key) - 1);
    });
  }

  async function start() {
    byId("file").textContent = decodeURIComponent(window.location.pathname.split("/").pop());
    volumes.t1w = await decode(data.t1w);
    volumes.labels = await decode(data.labels);
    volumes.states = await Promise.all(data.states.map((state) => decode(state.image)));
    planes.forEach(addPanel);
    addControls();
    byId(`state${view.state}`).checked = true;
    fit();
    window.addEventListener("resize", fit);
    byId("problem").hidden = true;
    document.body.dataset.ready = "yes";
  }

  start().catch((error) => {
    byId("problem").textContent = `The images could not be shown: ${error.message}`;
  });
})();

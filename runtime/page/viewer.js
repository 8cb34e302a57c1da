"use strict";
// Three linked planes of some volumes. What they are says the JSON beside them (viewer.py).
const OUTSIDE = -32768, NOTCH = 50, GREYS = 256;
const COLOURS = {
  gray: ["000000", "ffffff"],
  RdBu_r: ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d",
    "b2182b", "67001f"],
};

function palette(stops) {
  return Uint32Array.from({ length: GREYS }, (_, n) => {
    const at = n / (GREYS - 1) * (stops.length - 1), first = Math.min(Math.floor(at), stops.length - 2);
    const [from, to] = [first, first + 1].map((k) => parseInt(stops[k], 16));
    const mixed = [16, 8, 0].map((bits) => {
      const [a, b] = [from, to].map((colour) => colour >> bits & 255);
      return Math.round(a + (b - a) * (at - first));
    });
    return (255 << 24 | mixed[2] << 16 | mixed[1] << 8 | mixed[0]) >>> 0;
  });
}

async function unpacked(text) {
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let n = 0; n < packed.length; n++) bytes[n] = packed.charCodeAt(n);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Int16Array(await new Response(stream).arrayBuffer());
}

// zooms, goes back and so on
const theBrowsers = (event) => event.ctrlKey || event.altKey || event.metaKey;
const product = (row, [x, y, z]) => row[0] * x + row[1] * y + row[2] * z + row[3];

function placeText({ before, row, after, ends }, at) {
  const number = product(row, at);
  if (!ends) return `${before}${Math.round(number)}${after}`;
  const tenths = Math.floor(Math.floor(1000 * Math.abs(number) + 0.5) / 100 + 0.5);
  return `${before}${ends[number >= 0 || tenths === 0 ? 1 : 0]} ${(tenths / 10).toFixed(1)}${after}`;
}

class Row {
  constructor(element, facts, values) {
    Object.assign(this, { element, values }, facts);
    this.palette = palette(COLOURS[this.colours]);
    const bar = new ImageData(new Uint8ClampedArray(this.palette.buffer), GREYS, 1);
    this.find(".bar").getContext("2d").putImageData(bar, 0, 0);
    this.canvases = [...element.querySelectorAll(".panel canvas")];
  }

  find(selector) { return this.element.querySelector(selector); }

  text(whole) {
    if (whole === undefined) return "-";
    if (whole === OUTSIDE) return "outside";
    const value = whole * this.step;
    return `${this.digits > 3 ? Number(value.toPrecision(3)) : value.toFixed(this.digits)} ${this.unit}`;
  }

  setWindow(low, high) {
    [this.low, this.high] = [low, high].map((end) => Number(end.toPrecision(6)));
    for (const end of ["low", "high"])
      for (const input of this.element.querySelectorAll(`input.${end}`)) input.value = this[end];
    const [first, , last] = this.element.querySelectorAll(".ends span");
    [first.textContent, last.textContent] = [this.low, this.high];
  }

  draw(n, plane, shape, at) {
    const steps = [1, shape[0], shape[0] * shape[1]];
    const [width, height] = [shape[plane.across], shape[plane.up]], canvas = this.canvases[n];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const low = this.low / this.step, scale = GREYS * this.step / (this.high - this.low);
    let pixel = 0;
    for (let up = height - 1; up >= 0; up--) {
      let voxel = at[plane.through] * steps[plane.through] + up * steps[plane.up];
      for (let across = 0; across < width; across++, voxel += steps[plane.across]) {
        const value = this.values[voxel];
        if (value !== OUTSIDE) {
          const grey = Math.floor((value - low) * scale);
          pixels[pixel] = this.palette[Math.max(0, Math.min(GREYS - 1, grey))];
        }
        pixel++;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

class Viewer {
  constructor(element, facts, rows) {
    Object.assign(this, facts, { element, rows, pointed: null, over: null, spun: 0 });
    for (const row of rows) {
      this.reset(row);
      row.find("button").onclick = () => { this.reset(row); this.draw(); };
      for (const end of ["low", "high"])
        for (const input of row.element.querySelectorAll(`input.${end}`))
          input.addEventListener(input.type === "range" ? "input" : "change", () => {
            this.window(row, end, input.valueAsNumber);
          });
      row.element.querySelectorAll(".panel").forEach((panel, n) => this.listen(panel, this.planes[n]));
    }
    element.querySelector(".live").hidden = false;
    element.querySelector(".still")?.remove();
    new ResizeObserver(() => this.smooth()).observe(element);
    this.draw();
  }

  reset(row) { row.setWindow(...row.window); }

  window(row, end, number) { // the other end gives way
    const least = row.step / 10;
    if (!Number.isFinite(number)) row.setWindow(row.low, row.high);
    else if (end === "low") row.setWindow(number, Math.max(row.high, number + least));
    else row.setWindow(Math.min(row.low, number - least), number);
    this.draw();
  }

  listen(panel, plane) {
    const canvas = panel.querySelector("canvas");
    const voxel = (event) => {
      const box = canvas.getBoundingClientRect(), at = [...this.at];
      const across = Math.floor((event.clientX - box.left) / box.width * this.shape[plane.across]);
      const down = Math.floor((event.clientY - box.top) / box.height * this.shape[plane.up]);
      at[plane.across] = across;
      at[plane.up] = this.shape[plane.up] - 1 - down;
      return at;
    };
    canvas.onpointerdown = (event) => {
      if (event.button) return;
      this.move(voxel(event));
      canvas.setPointerCapture(event.pointerId);
    };
    canvas.onpointermove = (event) => {
      [this.pointed, this.over] = [voxel(event), plane];
      if (event.buttons & 1) this.move(this.pointed);
      else this.tell();
    };
    canvas.onpointerleave = () => { this.pointed = null; this.tell(); };
    canvas.addEventListener("wheel", (event) => {
      if (theBrowsers(event)) return;
      event.preventDefault();
      const turned = event.deltaY * (event.deltaMode ? NOTCH : 1); // lines and pages are notches
      this.spun += Math.max(-NOTCH, Math.min(NOTCH, turned));
      const whole = Math.trunc(this.spun / NOTCH);
      this.spun -= whole * NOTCH;
      this.step(plane.through, -whole);
    }, { passive: false });
    const keys = { ArrowLeft: [plane.across, -1], ArrowRight: [plane.across, 1],
      ArrowDown: [plane.up, -1], ArrowUp: [plane.up, 1], PageDown: [plane.through, -1],
      PageUp: [plane.through, 1] };
    panel.onkeydown = (event) => {
      if (theBrowsers(event) || !(event.key in keys)) return;
      event.preventDefault();
      this.step(...keys[event.key]);
    };
  }

  step(axis, by) {
    const at = [...this.at];
    at[axis] += by;
    this.move(at);
  }

  move(at) {
    this.at = at.map((n, axis) => Math.max(0, Math.min(this.shape[axis] - 1, n)));
    if (this.pointed) this.pointed[this.over.through] = this.at[this.over.through];
    this.draw();
  }

  draw() {
    for (const row of this.rows) this.planes.forEach((p, n) => row.draw(n, p, this.shape, this.at));
    const titles = this.element.querySelectorAll(".titles output");
    this.planes.forEach((plane, n) => { titles[n].textContent = placeText(plane, this.at); });
    for (const panels of this.element.querySelectorAll(".row"))
      panels.querySelectorAll(".panel").forEach((panel, n) => {
        const { across, up } = this.planes[n];
        panel.style.setProperty("--across", (this.at[across] + 0.5) / this.shape[across]);
        panel.style.setProperty("--up", (this.at[up] + 0.5) / this.shape[up]);
      });
    this.tell();
    this.smooth();
  }

  tell() {
    const index = (at) => at[0] + this.shape[0] * (at[1] + this.shape[1] * at[2]);
    const within = this.pointed?.every((n, axis) => n >= 0 && n < this.shape[axis]);
    for (const row of this.rows) {
      row.find(".value").textContent = row.text(row.values[index(this.at)]);
      row.find(".pointed").textContent = row.text(within ? row.values[index(this.pointed)] : undefined);
    }
    const stored = this.stored.map((row) => Math.round(product(row, this.at)));
    this.element.querySelector(".voxel").textContent = `Stored voxel ${stored.join(", ")}.`;
  }

  smooth() { // voxels stay voxels, unless there are more of them than pixels
    for (const canvas of this.element.querySelectorAll(".panel canvas")) {
      const shown = canvas.getBoundingClientRect().width * devicePixelRatio;
      canvas.style.imageRendering = shown < canvas.width ? "auto" : "pixelated";
    }
  }
}

async function open(element) {
  const facts = JSON.parse(element.querySelector(".facts").textContent);
  const volumes = [...element.querySelectorAll(".volume")].map((script) => unpacked(script.textContent));
  const values = await Promise.all(volumes), found = element.querySelectorAll(".row");
  new Viewer(element, facts, facts.rows.map((row, n) => new Row(found[n], row, values[n])));
}

addEventListener("DOMContentLoaded", async () => {
  let state = "ready";
  for (const element of document.querySelectorAll(".viewer"))
    try {
      await open(element);
    } catch (error) {
      state = "still";
      element.querySelector(".said").textContent += ` This browser cannot unpack the volumes, so that
        the planes do not move; one of 2023 or later can. (${error.message})`;
    }
  document.documentElement.dataset.state = state;
});

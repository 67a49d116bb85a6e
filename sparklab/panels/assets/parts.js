// Shared parts of every live panel: elements, ticks, and a canvas plot. Text from data, models and files enters as textContent only.

/** An element: make("b", "sl-word", "Training", {role: "status"}). */
function make(tag, className = "", text = "", attributes = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** Sets text only where it differs: unchanged nodes cost no layout and no announcement. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const FACTORS = [1, 2, 2.5, 5, 10];

/** Evenly spaced round numbers around [low, high]; the same arithmetic as ticks() in parts.py. */
function ticks(low, high, count = 4) {
  if (!isFinite(low) || !isFinite(high)) return [0, 1];
  if (high - low <= 1e-12 * Math.max(Math.abs(low), Math.abs(high), 1e-300)) {
    const room = (Math.abs(low) || 1) * 0.1;
    low -= room; high += room;
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * FACTORS.find((factor) => factor * power >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

/** 1, 2, 5 times powers of ten around [low, high], both above zero. */
function logTicks(low, high) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of [1, 2, 5]) all.push(factor * 10 ** power);
  }
  const first = Math.max(0, all.findLastIndex((tick) => tick <= low * 1.0001));
  const last = all.findIndex((tick) => tick >= high * 0.9999);
  const found = all.slice(first, (last < 0 ? all.length - 1 : last) + 1);
  const stride = Math.ceil(found.length / 7); // the ends stay, the middle thins out
  return found.filter((_, index) => index === 0 || index === found.length - 1 || (index % stride === 0 && index < found.length - stride / 2));
}

function tickLabel(value, step) {
  if (value && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)) return value.toPrecision(3).replace(/\.?0+(e|$)/, "$1");
  const decimals = step > 0 ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  const round = Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) < 1e-6;
  return value.toFixed(Math.min(6, decimals + (round ? 0 : 1)));
}

/** Where a step axis ends: a round number beyond the last step, so that the axis moves rarely; as axis_end() in parts.py. */
function axisEnd(last, steps) {
  const beyond = Math.max(10, last * 1.04), power = 10 ** Math.floor(Math.log10(beyond));
  const rounded = Math.floor([1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((factor) => factor * power >= beyond) * power);
  return Math.max(last, steps ? Math.min(rounded, steps) : rounded, 1);
}

/** The line that best fits the neighbours of each value, as smooth() in parts.py: no lag, no bias at the ends, NaN weighs nothing. */
function smooth(values, count, beta) {
  const smoothed = new Float32Array(count), before = new Float64Array(count * 5), sums = [0, 0, 0, 0, 0];
  const advance = (value) => { // sums over the values passed, d steps away, weighing beta**d: of 1, d, d*d, y and d*y
    const [s0, s1, s2, y, xy] = sums, own = isFinite(value);
    sums[0] = beta * s0 + (own ? 1 : 0); sums[1] = beta * (s1 + s0); sums[2] = beta * (s2 + 2 * s1 + s0);
    sums[3] = beta * y + (own ? value : 0); sums[4] = beta * (xy + y);
  };
  for (let index = 0; index < count; index++) { advance(values[index]); before.set(sums, index * 5); }
  sums.fill(0);
  for (let index = count - 1; index >= 0; index--) {
    const value = values[index], at = index * 5;
    advance(value);
    if (!isFinite(value)) { smoothed[index] = NaN; continue; }
    const s0 = before[at] + sums[0] - 1, s1 = sums[1] - before[at + 1], s2 = before[at + 2] + sums[2]; // the value itself is in both sides
    const y = before[at + 3] + sums[3] - value, xy = sums[4] - before[at + 4], spread = s0 * s2 - s1 * s1;
    smoothed[index] = spread > 1e-9 * s0 * s0 ? (s2 * y - s1 * xy) / spread : y / s0;
  }
  return smoothed;
}

/** Lowest and highest finite value of some series. */
function extent(...series) {
  let low = Infinity, high = -Infinity;
  for (const values of series) for (const value of values) {
    if (value < low) low = value; // NaN compares false and infinity is kept out below
    if (value > high && value !== Infinity) high = value;
  }
  return [low === -Infinity ? NaN : low, high];
}

/** The smallest value above zero, where a logarithmic axis begins. */
function leastPositive(...series) {
  let low = Infinity;
  for (const values of series) for (const value of values) if (value > 0 && value < low) low = value;
  return low;
}

/** A canvas at the device's own resolution, cleared; null while it has no size. */
function canvasContext(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width || !height) return null;
  const wide = Math.round(width * ratio), high = Math.round(height * ratio);
  if (canvas.width !== wide || canvas.height !== high) { canvas.width = wide; canvas.height = high; }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** One curve, at most first, lowest, highest and last value of each pixel column, so that 100,000 points draw as fast as 1,000. */
function strokeCurve(context, xs, values, count, X, Y, colour, lineWidth, alpha) {
  context.strokeStyle = colour; context.lineWidth = lineWidth; context.globalAlpha = alpha;
  context.lineJoin = context.lineCap = "round";
  context.beginPath();
  let column = NaN, low = 0, high = 0, last = 0, pen = false;
  const flush = () => { if (low !== high) { context.lineTo(column, Y(low)); context.lineTo(column, Y(high)); context.lineTo(column, Y(last)); } };
  for (let index = 0; index < count; index++) {
    const value = values[index];
    if (!isFinite(value)) continue;
    const x = Math.round(X(xs[index]) * 2) / 2;
    if (x !== column) {
      if (pen) { flush(); context.lineTo(x, Y(value)); } else { context.moveTo(x, Y(value)); pen = true; }
      column = x; low = high = last = value;
    } else { last = value; if (value < low) low = value; if (value > high) high = value; }
  }
  if (pen) { flush(); context.stroke(); }
  context.globalAlpha = 1;
}

/** Index of the value nearest to x in ascending xs[0..count). */
function nearest(xs, count, x) {
  let low = 0, high = count - 1;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle + 1; else high = middle; }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

/** Float rows that grow: append(bytes) takes little-endian float32 rows; column(i) is a view of one figure over all rows. */
class Rows {
  constructor(width) { this.width = width; this.stride = 1; this.clear(); }
  clear() { this.count = 0; this.columns = Array.from({ length: this.width }, () => new Float32Array(1024)); }
  append(view) {
    const floats = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    const rows = Math.floor(floats.length / this.width);
    while (this.columns[0].length < this.count + rows) {
      this.columns = this.columns.map((old) => { const grown = new Float32Array(old.length * 2); grown.set(old); return grown; });
    }
    for (let row = 0; row < rows; row++, this.count++) {
      for (let index = 0; index < this.width; index++) this.columns[index][this.count] = floats[row * this.width + index];
    }
  }
  column(index) { return this.columns[index].subarray(0, this.count); }
}

/** Calls back when the page changes between light and dark; returns how to stop. */
function onTheme(callback) {
  const query = window.matchMedia("(prefers-color-scheme: dark)");
  const observer = new MutationObserver(callback);
  observer.observe(document.body, { attributes: true, attributeFilter: ["class", "data-jp-theme-name", "data-vscode-theme-kind"] });
  query.addEventListener("change", callback);
  return () => { observer.disconnect(); query.removeEventListener("change", callback); };
}

/** Paints at most once a frame, and only while the panel can be seen; tell(seen) hears of it, at rest, when it goes out of sight or comes back. */
function painter(root, paint, tell) {
  let due = 0, dirty = false, near = false, said = null, timer = 0;
  const seen = () => near && !document.hidden;
  const ask = () => {
    dirty = true;
    if (!due && seen()) due = requestAnimationFrame(() => { due = 0; if (seen()) { dirty = false; paint(); } });
  };
  const check = () => {
    clearTimeout(timer);
    if (seen() !== said) timer = setTimeout(() => { said = seen(); tell(said); }, seen() ? 0 : 1500);
    if (seen() && dirty) ask();
  };
  const observer = new IntersectionObserver((entries) => { near = entries[entries.length - 1].isIntersecting; check(); }, { rootMargin: "200px" });
  observer.observe(root);
  document.addEventListener("visibilitychange", check);
  return { ask, stop: () => { cancelAnimationFrame(due); clearTimeout(timer); observer.disconnect(); document.removeEventListener("visibilitychange", check); } };
}

/** Keeps the live panel where its twin stands: an output drawn anew brings a new twin, and a kernel that is gone leaves the twin alone. */
function dwell(root, home) {
  let still = [], place = null, focus = null;
  const scrolled = new Map(); // an element that is moved forgets how far it was scrolled
  root.addEventListener("scroll", (event) => { if (root.isConnected) scrolled.set(event.target, event.target.scrollTop); }, true);
  root.addEventListener("focusin", (event) => { focus = event.target; });
  document.addEventListener("pointerdown", (event) => { if (!root.contains(event.target)) focus = null; }, true);
  const settle = () => {
    if (root.isConnected) return;
    const found = document.querySelector(`.${CSS.escape(home)}`);
    if (!found) return;
    place = found; still = [...found.childNodes];
    found.replaceChildren(root);
    for (const [node, top] of scrolled) node.scrollTop = top;
    if (focus && (document.activeElement === document.body || document.activeElement === null || document.activeElement.contains(root))) focus.focus({ preventScroll: true });
  };
  const observer = new MutationObserver(settle);
  observer.observe(document.body, { childList: true, subtree: true });
  settle();
  return () => { observer.disconnect(); if (place && root.isConnected) place.replaceChildren(...still); };
}

const LOOK_MILLISECONDS = 5000;

/** Tells the kernel every few seconds that somebody sees the panel: no page, a hidden tab and a panel scrolled away cost nothing. Returns how to stop. */
function lookAt(model, root) {
  let near = true;
  const look = () => { if (near && root.isConnected && document.visibilityState === "visible") model.send({ looking: true }); };
  const observer = new IntersectionObserver((entries) => { near = entries[entries.length - 1].isIntersecting; look(); });
  observer.observe(root);
  document.addEventListener("visibilitychange", look);
  const timer = setInterval(look, LOOK_MILLISECONDS);
  look();
  return () => { observer.disconnect(); document.removeEventListener("visibilitychange", look); clearInterval(timer); };
}

/** A stacked bar: parts of {gib, colour, hatched, name, text} on a scale, and a line. Nodes are kept; nothing glides, as that would lay the page out sixty times a second. */
function stackBar(bar, parts, scale, line) {
  while (bar.childElementCount > parts.length + 1) bar.lastElementChild.remove();
  while (bar.childElementCount < parts.length + 1) bar.insertBefore(make("div"), bar.firstElementChild);
  for (const [index, part] of parts.entries()) {
    const node = bar.children[index];
    node.className = part.hatched ? "sl-part sl-hatched" : "sl-part";
    node.style.width = `${100 * part.gib / (scale || 1)}%`; node.style.left = ""; // a node may have been the line before
    node.style.setProperty("--sl-own", part.colour || "transparent");
    node.title = `${part.name}: ${part.text}`;
  }
  const mark = bar.children[parts.length];
  mark.className = "sl-usable"; mark.style.width = ""; mark.title = "";
  mark.hidden = line === null || line === undefined;
  if (!mark.hidden) mark.style.left = `${100 * line / (scale || 1)}%`;
}

/** The parts by name and size, each beside its colour. */
function legendOf(list, parts) {
  while (list.childElementCount > parts.length) list.lastElementChild.remove();
  while (list.childElementCount < parts.length) {
    const entry = list.appendChild(make("span", "sl-entry"));
    entry.append(make("span", "sl-swatch"), make("span", "", "", { dir: "auto" }), make("span", "sl-dim"));
  }
  for (const [index, part] of parts.entries()) {
    const [square, name, size] = list.children[index].children;
    square.className = part.hatched ? "sl-swatch sl-hatched" : part.colour ? "sl-swatch sl-part" : "sl-swatch sl-hollow";
    square.style.setProperty("--sl-own", part.colour || "transparent");
    say(name, part.name); say(size, part.text);
  }
}

/** Both ways a panel comes to a page: into the place of its twin, or, without a home, where the front end shows widgets. live(model) makes {root, stop}. */
function resident(live) {
  return {
    initialize({ model }) {
      const home = model.get("home");
      if (!home) return undefined;
      const { root, stop } = live(model), leave = dwell(root, home);
      const end = () => { leave(); stop(); root.remove(); };
      model.on("comm_live_update", end);
      return end;
    },
    render({ model, el }) {
      if (model.get("home")) return undefined;
      try {
        const { root, stop } = live(model);
        el.appendChild(root);
        return stop;
      } catch (error) { // a panel that cannot draw says so where it would have been
        el.replaceChildren(make("pre", "", `The panel could not be drawn: ${error && error.message}`));
        return undefined;
      }
    },
  };
}

/** Lines and figures of the value axis, and words at the two ends of the other. */
function drawAxes(context, { marks, log, Y, left, right, bottom, end }, colour, [from, to] = ["step 0", `step ${end.toLocaleString("en")}`]) {
  context.lineWidth = 1; context.textAlign = "right"; context.textBaseline = "middle";
  for (const [index, mark] of marks.entries()) {
    const y = Math.round(Y(mark)) + 0.5;
    context.strokeStyle = colour("fg"); context.globalAlpha = 0.13; context.beginPath(); context.moveTo(left, y); context.lineTo(right, y); context.stroke();
    context.globalAlpha = 1;
    context.fillStyle = colour("dim");
    context.fillText(log ? String(+mark.toPrecision(2)) : tickLabel(mark, marks[Math.min(index + 1, marks.length - 1)] - marks[Math.min(index, marks.length - 2)]), left - 8, y);
  }
  context.textBaseline = "alphabetic"; context.textAlign = "left"; context.fillText(from, left, bottom + 18);
  context.textAlign = "right"; context.fillText(to, right, bottom + 18);
}

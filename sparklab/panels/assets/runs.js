// Runs side by side. The kernel computes every word and figure; this file lays them out where the static twin stands and draws the curves.

function runsLayout(root) {
  const ui = { hidden: new Set(), log: false, cursor: null };
  const add = (parent, name, tag, className, text, attributes) => (ui[name] = parent.appendChild(make(tag, className, text, attributes)));
  const heading = root.appendChild(make("div", "sl-heading"));
  add(heading, "title", "b", "sl-word");
  add(heading, "about", "span", "sl-dim");
  add(heading, "at", "span", "sl-at sl-dim");
  add(heading, "logButton", "button", "sl-button sl-small", "log", { type: "button", "aria-pressed": "false", title: "Logarithmic scale" });
  add(root, "plot", "canvas", "sl-plot", "", { role: "img", tabindex: "0", "aria-label": "Loss curves" });
  const wide = root.appendChild(make("div", "sl-wide", "", { tabindex: "0", role: "region", "aria-label": "Runs" }));
  const table = wide.appendChild(make("table", "sl-table"));
  ui.head = table.appendChild(make("thead")).appendChild(make("tr"));
  ui.body = table.appendChild(make("tbody"));
  return ui;
}

/** x and y of every run from the one block of numbers. */
function curvesOf(view, points) {
  const floats = new Float32Array(points.buffer.slice(points.byteOffset, points.byteOffset + points.byteLength));
  let place = 0;
  return (view.curves || []).map(({ count, evals }) => {
    const xs = new Float32Array(count), ys = new Float32Array(count);
    for (let index = 0; index < count; index++, place += 2) { xs[index] = floats[place]; ys[index] = floats[place + 1]; }
    return { xs, ys, evals };
  });
}

/** Draws the curves shown; returns what turns a pixel into a place on the axis. */
function drawRuns(ui, root, view, curves) {
  const surface = canvasContext(ui.plot);
  if (!surface) return null;
  const { context, width, height } = surface, style = getComputedStyle(root), colour = (name) => style.getPropertyValue(`--sl-${name}`).trim();
  const shown = curves.map((curve, index) => ({ ...curve, colour: view.rows[index].colour, index })).filter(({ index }) => !ui.hidden.has(view.rows[index].name));
  const series = shown.flatMap(({ ys, evals }) => [ys, evals.map(([, loss]) => loss)]);
  let [low, high] = extent(...series);
  context.font = `11px ${style.fontFamily}`;
  if (!isFinite(high)) {
    context.fillStyle = colour("dim"); context.textAlign = "center";
    context.fillText(curves.length ? "No step to show." : "The curves begin with the first step.", width / 2, height / 2);
    return null;
  }
  const log = ui.log && high > 0;
  if (log) low = Math.max(leastPositive(...series), high * 1e-9);
  const marks = log ? logTicks(low, high) : ticks(low, high), bend = log ? (value) => Math.log(Math.max(value, marks[0])) : (value) => value;
  const [floor, ceiling] = [bend(marks[0]), bend(marks[marks.length - 1])], [left, right, top, bottom] = [46, width - 10, 8, height - 24];
  const end = Math.max(1, ...shown.map(({ xs }) => xs[xs.length - 1] || 0));
  const X = (x) => left + (right - left) * x / end, Y = (value) => top + (bottom - top) * (1 - (bend(value) - floor) / (ceiling - floor || 1));
  drawAxes(context, { marks, log, Y, left, right, bottom, end: Math.round(end) }, colour, view.by_tokens ? ["0 tokens", `${compact(end)} tokens`] : undefined);
  for (const { xs, ys, evals, colour: own } of shown) {
    strokeCurve(context, xs, ys, xs.length, X, Y, own, 2, 1);
    context.fillStyle = own;
    for (const [x, loss] of evals) { context.beginPath(); context.arc(X(x), Y(loss), 3.2, 0, 7); context.fill(); }
  }
  if (ui.cursor !== null) {
    const x = Math.round(X(Math.min(ui.cursor, end))) + 0.5;
    context.strokeStyle = colour("dim"); context.lineWidth = 1; context.beginPath(); context.moveTo(x, top); context.lineTo(x, bottom); context.stroke();
  }
  ui.end = end;
  return (pixel) => Math.min(end, Math.max(0, (pixel - left) / (right - left) * end));
}

function compact(value) { return Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value); }

function showRows(ui, view, redraw) {
  const shown = JSON.stringify([view.headings, view.rows, [...ui.hidden]]);
  if (shown === ui.shown) return; // rows that stay are left alone: a pointer or the keyboard may be on them
  ui.shown = shown;
  ui.head.replaceChildren(make("th", "sl-dim", "run", { scope: "col" }), ...view.headings.map((text) => make("th", "sl-dim", text, { scope: "col" })));
  const had = document.activeElement?.dataset?.run;
  ui.body.replaceChildren(...view.rows.map((row) => {
    const line = make("tr"), cell = line.appendChild(make("th", "", "", { scope: "row" })), top = cell.appendChild(make("div", "sl-runname"));
    if (row.colour) {
      const hidden = ui.hidden.has(row.name), button = top.appendChild(make("button", "sl-toggle", "", { type: "button", "aria-pressed": String(!hidden), title: "Show or hide the curve" }));
      button.dataset.run = row.name; button.setAttribute("aria-label", `Curve of ${row.name}`); button.style.setProperty("--sl-own", row.colour);
      button.addEventListener("click", () => { ui.hidden.has(row.name) ? ui.hidden.delete(row.name) : ui.hidden.add(row.name); redraw(); });
      if (had === row.name) queueMicrotask(() => button.focus());
    }
    top.append(make("b", "", row.name, { dir: "auto" }), make("span", `sl-${row.tone}`, row.word));
    cell.appendChild(make("div", "sl-dim sl-text", [row.about, row.step, ...row.settings].filter(Boolean).join(" · ")));
    line.append(...row.cells.map((text, index) => make("td", row.best && index === 0 ? "sl-best" : "", text)));
    return line;
  }));
}

/** The losses of all runs at the cursor, in words. */
function sayAt(ui, view, curves) {
  if (ui.cursor === null) return say(ui.at, "");
  const values = curves.map(({ xs, ys }, index) => {
    const row = view.rows[index];
    return ui.hidden.has(row.name) || !xs.length || ui.cursor > xs[xs.length - 1] * 1.001 ? null : `${row.name} ${ys[nearest(xs, xs.length, ui.cursor)].toFixed(3)}`;
  });
  return say(ui.at, [view.by_tokens ? `${compact(ui.cursor)} tokens` : `step ${Math.round(ui.cursor).toLocaleString("en")}`, ...values.filter(Boolean)].join(" · "));
}

function liveRuns(model) {
  const root = make("div", "sparklab sl-runs", "", { role: "group", "aria-label": "Runs side by side" });
  const ui = runsLayout(root);
  let view, curves, place = null;
  const draw = () => { place = drawRuns(ui, root, view, curves); sayAt(ui, view, curves); };
  const redraw = () => { showRows(ui, view, redraw); draw(); };
  const show = () => {
    view = model.get("view"); curves = curvesOf(view, model.get("points"));
    say(ui.title, view.title); say(ui.about, view.about);
    ui.plot.setAttribute("aria-label", `Loss curves. ${view.rows.map((row) => [row.name, ...row.cells.map((text, index) => `${view.headings[index]} ${text}`)].join(", ")).join("; ")}.`);
    redraw();
    root.dataset.rows = view.rows.length; root.dataset.reached = Math.max(0, ...curves.map(({ xs }) => xs[xs.length - 1] || 0));
  };
  ui.logButton.addEventListener("click", () => { ui.log = !ui.log; ui.logButton.setAttribute("aria-pressed", String(ui.log)); draw(); });
  ui.plot.addEventListener("pointermove", (event) => { if (place) { ui.cursor = place(event.offsetX); draw(); } });
  ui.plot.addEventListener("pointerleave", () => { ui.cursor = null; draw(); });
  ui.plot.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way || !place) return;
    event.preventDefault(); event.stopPropagation();
    ui.cursor = Math.min(ui.end, Math.max(0, (ui.cursor ?? ui.end) + way * ui.end / 100));
    draw();
  });
  model.on("change:points change:view", show);
  show();
  const sizes = new ResizeObserver(draw);
  sizes.observe(root);
  const stops = [lookAt(model, root), onTheme(draw)];
  return { root, stop: () => { model.off("change:points change:view", show); sizes.disconnect(); for (const stop of stops) stop(); } };
}

export default resident(liveRuns);

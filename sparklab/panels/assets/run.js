// The live run panel. The kernel computes every word and figure; this file lays them out, draws the curves and passes the buttons on.

const STEP = 0, LOSS = 1, RATE = 2, NORM = 3, SPEED = 4, WIDTH = 5;
const BUTTONS = [["pause", "Pause"], ["checkpoint", "Checkpoint"], ["sample", "Sample"], ["stop", "Stop"]];
const ASKED = { stop: "Stopping…", pause: "Pausing…", resume: "Resuming…", checkpoint: "Saving a checkpoint…", sample: "Sampling…" };
const STRIPS = [["tokens_per_second", "Tokens per second", SPEED], ["learning_rate", "Learning rate", RATE], ["grad_norm", "Gradient norm", NORM]];

function layout(root) {
  const ui = { root };
  const add = (parent, name, tag, className, text, attributes) => (ui[name] = parent.appendChild(make(tag, className, text, attributes)));
  const top = root.appendChild(make("div", "sl-top"));
  const who = top.appendChild(make("div", "sl-who"));
  add(who, "dot", "span", "sl-dot", "", { "aria-hidden": "true" });
  add(who, "word", "b", "sl-word", "", { role: "status", "aria-live": "polite" });
  add(who, "name", "span", "sl-name", "", { dir: "auto" });
  add(who, "about", "span", "sl-dim");
  const keys = top.appendChild(make("div", "sl-keys", "", { role: "group", "aria-label": "Steer the run" }));
  ui.keys = keys;
  ui.buttons = Object.fromEntries(BUTTONS.map(([key, label]) => [key, keys.appendChild(make("button", "sl-button", label, { type: "button", "data-command": key }))]));
  const line = root.appendChild(make("div", "sl-line"));
  add(line, "times", "span", "sl-dim");
  add(line, "ack", "span", "sl-ack", "", { role: "status", "aria-live": "polite" });
  const bar = root.appendChild(make("div", "sl-bar", "", { role: "progressbar", "aria-label": "Steps done", "aria-valuemin": "0", "aria-valuemax": "100" }));
  ui.bar = bar;
  add(bar, "fill", "div", "sl-fill");
  const trouble = (ui.trouble = root.appendChild(make("div", "sl-trouble")));
  trouble.hidden = true;
  add(trouble, "reason", "div", "sl-text", "", { dir: "auto" });
  const remedy = (ui.remedy = trouble.appendChild(make("div", "sl-text")));
  remedy.append(make("b", "", "What to do: "));
  add(remedy, "fix", "span", "", "", { dir: "auto" });
  layoutLoss(root, ui, add);
  layoutFigures(root, ui, add);
  const memory = root.appendChild(make("section", "sl-section", "", { "aria-label": "Memory" }));
  const heading = memory.appendChild(make("div", "sl-heading"));
  heading.appendChild(make("b", "", "Memory"));
  add(heading, "memoryAside", "span", "sl-dim");
  add(memory, "stack", "div", "sl-stack", "", { role: "img" });
  add(memory, "legend", "div", "sl-legend");
  for (const [name, label] of [["samples", "Samples"], ["notes", "Messages"]]) {
    const fold = root.appendChild(make("details", "sl-fold"));
    const summary = fold.appendChild(make("summary", "", ""));
    summary.appendChild(make("b", "", label));
    ui[`${name}Count`] = summary.appendChild(make("span", "sl-dim", ""));
    ui[`${name}List`] = fold.appendChild(make("div", "sl-list", "", { tabindex: "0", role: "region", "aria-label": label }));
  }
  return ui;
}

function layoutLoss(root, ui, add) {
  const loss = root.appendChild(make("section", "sl-section", "", { "aria-label": "Loss" }));
  const heading = loss.appendChild(make("div", "sl-heading"));
  heading.appendChild(make("b", "", "Loss"));
  for (const [name, label] of [["raw", "training"], ["smooth", "smoothed"], ["heldOut", "held-out"], ["best", "best"]]) {
    const item = heading.appendChild(make("span", `sl-key sl-key-${name}`));
    item.appendChild(make("span", "sl-dim", label));
    add(item, name, "span", "sl-value", "–");
  }
  add(heading, "broken", "b", "sl-badge");
  ui.broken.hidden = true;
  add(heading, "at", "span", "sl-at sl-dim");
  add(heading, "log", "button", "sl-button sl-small", "log", { type: "button", "aria-pressed": "false", title: "Logarithmic scale" });
  add(loss, "plot", "canvas", "sl-plot", "", { role: "img", tabindex: "0", "aria-label": "Loss curve" });
}

function layoutFigures(root, ui, add) {
  const figures = root.appendChild(make("div", "sl-figures"));
  ui.strips = {};
  for (const [key, label] of STRIPS) {
    const tile = figures.appendChild(make("div", "sl-tile"));
    tile.appendChild(make("div", "sl-dim", label));
    add(tile, key, "div", "sl-figure", "–");
    ui.strips[key] = tile.appendChild(make("canvas", "sl-strip", "", { "aria-hidden": "true" }));
  }
  const tile = (ui.matchTile = figures.appendChild(make("div", "sl-tile")));
  tile.hidden = true;
  tile.appendChild(make("div", "sl-dim", "Exact match"));
  add(tile, "exact_match", "div", "sl-figure", "–");
  add(tile, "matchNote", "div", "sl-dim");
}

/** Draws the loss chart; returns the horizontal scale for hovering, or null while there is nothing. */
function drawLoss(ui, rows, curve, smoothed, view) {
  const surface = canvasContext(ui.plot);
  if (!surface) return null;
  const { context, width, height } = surface, style = getComputedStyle(ui.root);
  const colour = (name) => style.getPropertyValue(`--sl-${name}`).trim();
  const left = 46, right = width - 10, top = 8, bottom = height - 24;
  context.font = `11px ${style.fontFamily}`;
  const xs = rows.column(STEP), losses = rows.column(LOSS), evals = curve.evals || [];
  if (!rows.count && !evals.length) {
    context.fillStyle = colour("dim"); context.textAlign = "center";
    context.fillText(view.over ? "No step was made." : "The curve begins with the first step.", width / 2, height / 2);
    return null;
  }
  const held = evals.map(([, loss]) => loss);
  let [low, high] = extent(losses, held);
  const log = view.log && high > 0;
  if (log) low = Math.max(leastPositive(losses, held), high * 1e-9);
  const marks = log ? logTicks(low, high) : ticks(low, high);
  const bend = log ? (value) => Math.log(Math.max(value, marks[0])) : (value) => value;
  const [floor, ceiling] = [bend(marks[0]), bend(marks[marks.length - 1])];
  const lastStep = Math.max(rows.count ? xs[rows.count - 1] : 0, evals.length ? evals[evals.length - 1][0] : 0);
  const end = view.over ? Math.max(lastStep, 1) : axisEnd(lastStep, curve.steps);
  const X = (step) => left + (right - left) * step / end;
  const Y = (value) => top + (bottom - top) * (1 - (bend(value) - floor) / (ceiling - floor || 1));
  drawAxes(context, marks, log, Y, left, right, bottom, end, colour);
  strokeCurve(context, xs, losses, rows.count, X, Y, colour("loss"), 1, rows.count < right - left ? 0.42 : 0.28);
  strokeCurve(context, xs, smoothed, rows.count, X, Y, colour("bg"), 4.5, 0.75); // a rim that lifts the bold curve off the raw one
  strokeCurve(context, xs, smoothed, rows.count, X, Y, colour("loss"), 2, 1);
  strokeCurve(context, evals.map(([step]) => step), held, held.length, X, Y, colour("held-out"), 1, 0.6);
  const dot = (x, y, radius, fill) => { context.fillStyle = fill; context.beginPath(); context.arc(x, y, radius, 0, 7); context.fill(); };
  for (const [step, loss] of evals) dot(X(step), Y(loss), 3.5, colour("held-out"));
  if (curve.best) { dot(X(curve.best[0]), Y(curve.best[1]), 6, colour("held-out")); dot(X(curve.best[0]), Y(curve.best[1]), 3.5, colour("good")); }
  context.fillStyle = colour("bad");
  for (let index = 0; index < rows.count; index++) if (!isFinite(losses[index])) context.fillRect(X(xs[index]) - 1, bottom - 8, 2, 8);
  if (view.cursor !== null && view.cursor < rows.count) {
    const x = Math.round(X(xs[view.cursor])) + 0.5;
    context.strokeStyle = colour("dim"); context.lineWidth = 1;
    context.beginPath(); context.moveTo(x, top); context.lineTo(x, bottom); context.stroke();
    if (isFinite(smoothed[view.cursor])) dot(x, Y(smoothed[view.cursor]), 4, colour("loss"));
  }
  return (pixel) => (pixel - left) / (right - left) * end;
}

function drawAxes(context, marks, log, Y, left, right, bottom, end, colour) {
  context.lineWidth = 1; context.textAlign = "right"; context.textBaseline = "middle";
  for (const [index, mark] of marks.entries()) {
    const y = Math.round(Y(mark)) + 0.5;
    context.strokeStyle = colour("fg"); context.globalAlpha = 0.13; context.beginPath(); context.moveTo(left, y); context.lineTo(right, y); context.stroke();
    context.globalAlpha = 1;
    context.fillStyle = colour("dim");
    context.fillText(log ? String(+mark.toPrecision(2)) : tickLabel(mark, marks[Math.min(index + 1, marks.length - 1)] - marks[Math.min(index, marks.length - 2)]), left - 8, y);
  }
  context.textBaseline = "alphabetic"; context.textAlign = "left"; context.fillText("step 0", left, bottom + 18);
  context.textAlign = "right"; context.fillText(`step ${end.toLocaleString("en")}`, right, bottom + 18);
}

function drawStrip(canvas, rows, index, root) {
  const surface = canvasContext(canvas);
  if (!surface || !rows.count) return;
  const { context, width, height } = surface, values = rows.column(index), xs = rows.column(STEP);
  const [, high] = extent(values);
  const first = xs[0], span = Math.max(1, xs[rows.count - 1] - first);
  const X = (step) => 1 + (width - 2) * (step - first) / span, Y = (value) => height - 2 - (height - 4) * Math.min(1, value / (high || 1));
  strokeCurve(context, xs, values, rows.count, X, Y, getComputedStyle(root).getPropertyValue("--sl-fg").trim(), 1.25, 0.5);
}

function showHead(ui, head, name) {
  say(ui.word, head.word || "Starting"); say(ui.name, name[0] || ""); say(ui.about, [name[1], head.device].filter(Boolean).join(" · "));
  const over = head.over;
  say(ui.times, head.times || "");
  ui.root.dataset.status = head.status || "starting"; ui.root.dataset.tone = head.tone || "run";
  const share = Math.round(1000 * (head.share || 0)) / 10;
  ui.fill.style.width = `${share}%`; ui.bar.setAttribute("aria-valuenow", String(share)); ui.bar.setAttribute("aria-valuetext", head.step || "");
  ui.trouble.hidden = !(over && (head.reason || head.fix));
  say(ui.reason, head.reason || ""); say(ui.fix, head.fix || ""); ui.remedy.hidden = !head.fix;
  ui.keys.classList.toggle("sl-gone", Boolean(over));
  say(ui.buttons.pause, head.status === "paused" ? "Resume" : "Pause");
  ui.buttons.pause.dataset.command = head.status === "paused" ? "resume" : "pause";
}

function size(gib) {
  if (gib === null || gib === undefined) return "–";
  if (gib > 0 && gib < 0.1) return gib * 1024 >= 1 ? `${(gib * 1024).toFixed(0)} MiB` : "< 1 MiB";
  return `${gib < 10 ? gib.toFixed(2) : gib < 100 ? gib.toFixed(1) : Math.round(gib).toLocaleString("en")} GiB`;
}

function showMemory(ui, memory) {
  const share = (gib) => `${100 * gib / (memory.scale || 1)}%`;
  say(ui.memoryAside, memory.figures || "");
  const block = (className, width, colour, title) => {
    const node = make("div", className); node.style.width = share(width); if (colour) node.style.background = colour; if (title) node.title = title;
    return node;
  };
  const plan = make("div", "sl-planned"), real = make("div", "sl-measured");
  plan.replaceChildren(...(memory.segments || []).map((s) => block("", s.gib, s.colour, `${s.name}: ${size(s.gib)}${s.formula ? ` = ${s.formula}` : ""}`)));
  if (memory.peak !== null) real.appendChild(block("sl-peak", memory.peak, "", `measured peak ${size(memory.peak)}`));
  if (memory.now !== null) real.appendChild(block("sl-now", Math.min(memory.now, memory.scale || 1), "", `now ${size(memory.now)}`));
  ui.stack.replaceChildren(plan, real);
  if (memory.line !== null && memory.line !== undefined) {
    const line = make("div", "sl-usable"); line.style.left = share(memory.line); line.title = `usable ${size(memory.line)}`;
    ui.stack.appendChild(line);
  }
  ui.stack.setAttribute("aria-label", memory.words || "Memory");
  const entry = (colour, name, gib) => {
    const node = make("span", "sl-entry"); const square = node.appendChild(make("span", "sl-swatch")); square.style.background = colour;
    node.append(make("span", "", name), make("span", "sl-dim", gib === null ? "" : size(gib)));
    return node;
  };
  const entries = (memory.segments || []).map((s) => entry(s.colour, s.name, s.gib));
  if (memory.peak !== null) entries.push(entry("var(--sl-measured)", "measured", memory.peak));
  if (memory.line !== null && memory.line !== undefined) entries.push(entry("var(--sl-bad)", "usable", memory.line));
  ui.legend.replaceChildren(...entries);
}

/** Fills a folded list; a reader who has scrolled down stays where they are. */
function showList(list, count, nodes, total) {
  say(count, total ? String(total) : "none yet");
  const below = list.scrollHeight - list.scrollTop, reading = list.scrollTop > 0;
  list.replaceChildren(...nodes);
  if (reading) list.scrollTop = list.scrollHeight - below;
}

function sampleNode(sample) {
  const node = make("div", "sl-sample");
  node.append(make("div", "sl-dim", sample.step), make("div", "sl-dim sl-text", sample.prompt, { dir: "auto" }), make("div", "sl-text", sample.text, { dir: "auto" }));
  return node;
}

function noteNode(note) {
  const node = make("div", "sl-note");
  node.append(make("span", "sl-dim", note.time), make("span", `sl-text ${note.tone ? `sl-${note.tone}` : ""}`, note.text, { dir: "auto" }));
  return node;
}

/** The buttons: an answer at once, the worker's own when it comes, and the truth when nobody answers. */
function steer(ui, model) {
  let asked = null, timer = 0;
  const show = () => {
    const ack = model.get("ack") || {}, waiting = ack.waiting || [];
    if (asked && (ack.count || 0) > asked.count) { asked = null; clearTimeout(timer); }
    say(ui.ack, asked ? asked.text : ack.text || "");
    ui.root.dataset.ack = asked ? "asked" : ack.text ? (waiting.length ? "waiting" : "done") : "";
    for (const button of Object.values(ui.buttons)) {
      button.disabled = Boolean(model.get("head").over) || waiting.includes(button.dataset.command) || (asked !== null && asked.command === button.dataset.command);
    }
  };
  for (const button of Object.values(ui.buttons)) button.addEventListener("click", () => {
    const command = button.dataset.command;
    asked = { command, text: ASKED[command], count: (model.get("ack") || {}).count || 0 };
    clearTimeout(timer);
    timer = setTimeout(() => { if (asked) { asked.text = `${ASKED[command]} The kernel has not answered: it is busy or gone.`; show(); } }, 5000);
    model.send({ command });
    show();
  });
  return { show, stop: () => clearTimeout(timer) };
}

/** The curves: keeps the rows, repaints when the page paints, follows the pointer and the arrow keys. */
function curves(ui, model) {
  const rows = new Rows(WIDTH), view = { log: false, cursor: null, over: false };
  let smoothed = new Float32Array(0), scale = null, due = 0;
  const format = (value, none = "NaN") => (isFinite(value) ? value.toFixed(3) : none);
  const readout = () => {
    const curve = model.get("curve"), figures = model.get("figures"), at = view.cursor !== null && view.cursor < rows.count ? view.cursor : rows.count - 1;
    say(ui.raw, rows.count ? format(rows.column(LOSS)[at]) : "–"); say(ui.smooth, rows.count ? format(smoothed[at], "–") : "–");
    say(ui.heldOut, figures.held_out || "–"); say(ui.best, curve.best ? `${curve.best[1].toFixed(3)} at ${curve.best[0].toLocaleString("en")}` : "–");
    say(ui.at, view.cursor !== null && rows.count ? `at step ${rows.column(STEP)[at].toLocaleString("en")}` : "");
    const losses = rows.column(LOSS); let broken = 0, first = 0;
    for (let index = 0; index < rows.count; index++) if (!isFinite(losses[index]) && !broken++) first = rows.column(STEP)[index];
    ui.broken.hidden = !broken; say(ui.broken, broken ? `${broken} NaN, first at step ${first.toLocaleString("en")}` : "");
    ui.plot.setAttribute("aria-label", `Loss over ${rows.count} steps: training ${ui.raw.textContent}, held-out ${ui.heldOut.textContent}. Arrow keys read single steps.`);
  };
  const paint = () => {
    due = 0;
    view.over = Boolean(model.get("head").over);
    smoothed = smooth(rows.column(LOSS), rows.count, model.get("curve").beta || 0.9);
    readout();
    scale = drawLoss(ui, rows, model.get("curve"), smoothed, view);
    for (const [key, , index] of STRIPS) drawStrip(ui.strips[key], rows, index, ui.root);
    ui.root.dataset.rows = String(rows.count);
  };
  const ask = () => { if (!due) due = requestAnimationFrame(paint); };
  const point = (index) => { view.cursor = index === null || !rows.count ? null : Math.max(0, Math.min(rows.count - 1, index)); ask(); };
  ui.plot.addEventListener("pointermove", (event) => scale && point(nearest(rows.column(STEP), rows.count, scale(event.offsetX))));
  ui.plot.addEventListener("pointerleave", () => point(null));
  ui.plot.addEventListener("blur", () => point(null));
  ui.plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === "Escape") point(null);
    if (!move) return;
    event.preventDefault(); event.stopPropagation(); // the notebook would move to another cell
    point((view.cursor === null ? rows.count : view.cursor) + move);
  });
  ui.log.addEventListener("click", () => { view.log = !view.log; ui.log.setAttribute("aria-pressed", String(view.log)); ask(); });
  const load = () => { const bytes = model.get("history"); rows.clear(); if (bytes && bytes.byteLength) rows.append(bytes); ask(); };
  const message = (content, buffers) => {
    if (content.kind !== "rows") return;
    if (content.from === 0) rows.clear();
    if (content.from > rows.count) { model.send({ command: "history" }); return; } // a gap: this page came late
    if (buffers && buffers[0]) rows.append(buffers[0], rows.count - content.from);
    ask();
  };
  load();
  if ((model.get("head").rows || 0) !== rows.count) model.send({ command: "history" });
  return { ask, message, load, stop: () => cancelAnimationFrame(due) };
}

function live({ model, el }) {
  const root = make("div", "sparklab", "", { role: "group", "aria-label": "Training run" });
  el.appendChild(root);
  const ui = layout(root), plot = curves(ui, model), buttons = steer(ui, model);
  const show = {
    head: () => { showHead(ui, model.get("head"), model.get("name")); buttons.show(); plot.ask(); },
    ack: buttons.show,
    curve: plot.ask,
    figures: () => {
      const figures = model.get("figures");
      for (const [key] of STRIPS) say(ui[key], figures[key] || "–");
      ui.matchTile.hidden = !figures.exact_match; say(ui.exact_match, figures.exact_match || ""); say(ui.matchNote, figures.exact_match_count || "");
      plot.ask();
    },
    memory: () => showMemory(ui, model.get("memory")),
    samples: () => showList(ui.samplesList, ui.samplesCount, model.get("samples").map(sampleNode), model.get("head").samples || 0),
    notes: () => showList(ui.notesList, ui.notesCount, model.get("notes").map(noteNode), model.get("head").notes || 0),
    history: plot.load,
  };
  for (const [name, update] of Object.entries(show)) { model.on(`change:${name}`, update); if (name !== "history") update(); }
  model.on("msg:custom", plot.message);
  const resize = new ResizeObserver(plot.ask);
  resize.observe(ui.plot);
  const offTheme = onTheme(plot.ask);
  return () => {
    for (const [name, update] of Object.entries(show)) model.off(`change:${name}`, update);
    model.off("msg:custom", plot.message);
    resize.disconnect(); offTheme(); plot.stop(); buttons.stop();
  };
}

function render(context) {
  try {
    return live(context);
  } catch (error) { // a panel that cannot draw says so where it would have been
    context.el.replaceChildren(make("pre", "", `The panel could not be drawn: ${error && error.message}`));
    return undefined;
  }
}

export default { render };

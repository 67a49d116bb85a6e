// The live run panel. The kernel computes every word and figure; this file lays them out, draws the curves and passes the buttons on.

const BUTTONS = [["pause", "Pause"], ["checkpoint", "Checkpoint"], ["evaluate", "Evaluate"], ["sample", "Sample"], ["stop", "Stop"]];
const ASKED = {
  stop: "Stopping…", pause: "Pausing…", resume: "Resuming…", checkpoint: "Saving a checkpoint…", sample: "Sampling…", evaluate: "Evaluating…",
  learning_rate: "Changing the learning rate…",
};
const TILES = [
  ["tokens_per_second", "Tokens per second", "speed_note", [SPEED]],
  ["grad_norm", "Gradient norm", "norm_note", [NORM, PEAK]],
  ["learning_rate", "Learning rate", "rate_note", [RATE]],
  ["energy", "Energy", "energy_note", null],
  ["exact_match", "Exact match", "exact_match_count", null],
];

function layout(root) {
  const ui = { root };
  const add = (parent, name, tag, className, text, attributes) => (ui[name] = parent.appendChild(make(tag, className, text, attributes)));
  const top = root.appendChild(make("div", "sl-top"));
  const who = top.appendChild(make("div", "sl-who"));
  add(who, "dot", "span", "sl-dot", "", { "aria-hidden": "true" });
  add(who, "word", "b", "sl-word", "", { role: "status", "aria-live": "polite" });
  add(who, "name", "span", "sl-name", "", { dir: "auto" });
  add(who, "about", "span", "sl-dim");
  add(top, "keys", "div", "sl-keys", "", { role: "group", "aria-label": "Steer the run" });
  ui.buttons = Object.fromEntries(BUTTONS.map(([key, label]) => [key, ui.keys.appendChild(make("button", "sl-button", label, { type: "button", "data-command": key }))]));
  const line = root.appendChild(make("div", "sl-line"));
  add(line, "times", "span", "sl-dim");
  add(line, "ack", "span", "sl-ack", "", { role: "status", "aria-live": "polite" });
  add(root, "bar", "div", "sl-bar", "", { role: "progressbar", "aria-label": "Steps done", "aria-valuemin": "0", "aria-valuemax": "100" });
  add(ui.bar, "fill", "div", "sl-fill");
  add(root, "trouble", "div", "sl-trouble");
  ui.trouble.hidden = true;
  add(ui.trouble, "reason", "div", "sl-text", "", { dir: "auto" });
  add(ui.trouble, "remedy", "div", "sl-text");
  ui.remedy.append(make("b", "", "What to do: "));
  add(ui.remedy, "fix", "span", "", "", { dir: "auto" });
  layoutLoss(root, ui, add);
  layoutTiles(root, ui, add);
  layoutMemory(root, ui, add);
  const samples = layoutFold(root, ui, "samples", "Samples");
  const form = (ui.form = make("form", "sl-ask", "", { "data-lm-suppress-shortcuts": "true" }));
  samples.insertBefore(form, ui.samplesList);
  add(form, "prompt", "input", "sl-input", "", { type: "text", dir: "auto", "aria-label": "Ask the model as it is now", placeholder: "Ask the model as it is now", autocomplete: "off" });
  add(form, "askButton", "button", "sl-button", "Ask", { type: "submit" });
  layoutFold(root, ui, "notes", "Messages");
  return ui;
}

function layoutFold(root, ui, name, label) {
  const fold = (ui[`${name}Fold`] = root.appendChild(make("details", "sl-fold")));
  const summary = fold.appendChild(make("summary", "", ""));
  summary.appendChild(make("b", "", label));
  ui[`${name}Count`] = summary.appendChild(make("span", "sl-dim", ""));
  ui[`${name}Latest`] = summary.appendChild(make("bdi", "sl-preview sl-dim", "", { "aria-hidden": "true" }));
  ui[`${name}List`] = fold.appendChild(make("div", "sl-list", "", { tabindex: "0", role: "region", "aria-label": label }));
  return fold;
}

function layoutLoss(root, ui, add) {
  const loss = root.appendChild(make("section", "sl-section", "", { "aria-label": "Loss" }));
  const heading = loss.appendChild(make("div", "sl-heading"));
  heading.appendChild(make("b", "", "Loss"));
  for (const [name, label] of [["raw", "training"], ["smooth", "smoothed"], ["heldOut", "held-out"], ["best", "best"]]) {
    const item = (ui[`${name}Key`] = heading.appendChild(make("span", `sl-key sl-key-${name}`)));
    item.appendChild(make("span", "sl-dim", label));
    add(item, name, "span", "sl-value", "–");
  }
  add(heading, "badge", "b", "sl-badge", "", { role: "status" });
  ui.badge.hidden = true;
  add(heading, "at", "span", "sl-at sl-dim");
  const controls = heading.appendChild(make("span", "sl-controls"));
  const label = controls.appendChild(make("label", "sl-dim", "smooth "));
  ui.smoothing = label.appendChild(make("input", "sl-range", "", { type: "range", min: "-5", max: "5", step: "1", value: "0", "aria-label": "Smoothing of the loss" }));
  add(controls, "log", "button", "sl-button sl-small", "log", { type: "button", "aria-pressed": "false", "aria-label": "log scale" });
  add(loss, "plot", "canvas", "sl-plot", "", { role: "img", tabindex: "0", "aria-label": "Loss curve" });
}

function layoutTiles(root, ui, add) {
  const tiles = root.appendChild(make("div", "sl-figures"));
  ui.strips = {}; ui.tiles = {};
  for (const [key, label, note, columns] of TILES) {
    const tile = (ui.tiles[key] = tiles.appendChild(make("div", "sl-tile")));
    const head = tile.appendChild(make("div", "sl-tilehead"));
    head.appendChild(make("span", "sl-dim", label));
    add(tile, key, "div", "sl-figure", "–");
    if (key === "learning_rate") layoutRate(ui, add, head, tile);
    add(tile, note, "div", "sl-tilenote sl-dim");
    if (columns) ui.strips[key] = tile.appendChild(make("canvas", "sl-strip", "", { "aria-hidden": "true" }));
  }
}

/** The learning rate can be changed, on demand: a small button, then a field where the figure was. */
function layoutRate(ui, add, head, tile) {
  add(head, "change", "button", "sl-button sl-small", "change", { type: "button", "aria-expanded": "false", "aria-label": "Change the learning rate" });
  const form = add(tile, "rateForm", "form", "sl-ask", "", { "data-lm-suppress-shortcuts": "true" });
  form.hidden = true;
  add(form, "rate", "input", "sl-input", "", { type: "text", inputmode: "decimal", "aria-label": "New peak learning rate", placeholder: "1e-4", autocomplete: "off" });
  add(form, "rateButton", "button", "sl-button sl-small", "Set", { type: "submit" });
}

function layoutMemory(root, ui, add) {
  const memory = root.appendChild(make("section", "sl-section", "", { "aria-label": "Memory" }));
  const heading = memory.appendChild(make("div", "sl-heading"));
  heading.appendChild(make("b", "", "Memory"));
  const light = (ui.light = heading.appendChild(make("span", "sl-light")));
  light.append((ui.lightDot = make("span", "sl-dot", "", { "aria-hidden": "true" })), (ui.lightWord = make("span")), (ui.lightReason = make("span", "sl-dim")));
  add(heading, "usable", "span", "sl-at sl-dim");
  add(memory, "bars", "div", "sl-bars", "", { role: "img" });
  barRow(ui, ui.bars, "planned", "planned", "");
  barRow(ui, ui.bars, "measured", "measured", "sl-thin");
  add(memory, "legend", "div", "sl-legend");
  add(memory, "pool", "div", "");
  barRow(ui, add(ui.pool, "poolBars", "div", "sl-bars sl-poolbars", "", { "aria-hidden": "true" }), "whole", "whole box", "sl-thin");
  add(ui.pool, "poolLegend", "div", "sl-legend");
}

/** A row of the memory's bars: what it shows, the bar, its figures. */
function barRow(ui, bars, name, label, className) {
  const row = bars.appendChild(make("div", "sl-barrow"));
  row.append(make("span", "sl-dim", label), (ui[name] = make("div", `sl-stackbar ${className}`)), (ui[`${name}Text`] = make("span", "sl-bartext")));
}

function showHead(ui, head, name) {
  say(ui.word, head.word || "Starting"); say(ui.name, name[0] || ""); say(ui.about, [name[1], head.device].filter(Boolean).join(" · "));
  const over = Boolean(head.over), share = Math.round(1000 * (head.share || 0)) / 10;
  say(ui.times, head.times || "");
  ui.root.dataset.status = head.status || "starting"; ui.root.dataset.tone = head.tone || "run";
  ui.fill.style.width = `${share}%`; ui.bar.setAttribute("aria-valuenow", String(share)); ui.bar.setAttribute("aria-valuetext", head.step || "");
  ui.trouble.hidden = !(over && (head.reason || head.fix));
  say(ui.reason, head.reason || ""); say(ui.fix, head.fix || ""); ui.remedy.hidden = !head.fix;
  ui.keys.classList.toggle("sl-gone", over); ui.form.hidden = ui.change.hidden = over;
  if (over) ui.rateForm.hidden = true;
  say(ui.buttons.pause, head.status === "paused" ? "Resume" : "Pause");
  ui.buttons.pause.dataset.command = head.status === "paused" ? "resume" : "pause";
}

function showFigures(ui, figures) {
  for (const [key, , note] of TILES) { say(ui[key], figures[key] || "–"); say(ui[note], figures[note] || ""); }
  ui.tiles.exact_match.hidden = !figures.exact_match;
  ui.badge.hidden = !figures.badge; say(ui.badge, figures.badge || "");
}

function showMemory(ui, memory) {
  const { segments = [], pool, light = {}, peak } = memory, now = memory.now ?? peak, nothing = peak === null || peak === undefined;
  const measured = nothing ? [] : [
    { name: "now", text: "", gib: Math.min(now, peak), colour: "var(--sl-measured)" },
    { name: "peak", text: "", gib: Math.max(0, peak - now), colour: "var(--sl-peak)" },
  ];
  stackBar(ui.planned, segments, memory.scale, memory.line);
  stackBar(ui.measured, measured, memory.scale, memory.line);
  say(ui.plannedText, memory.planned_text || ""); say(ui.measuredText, memory.measured_text || ""); ui.measuredText.classList.toggle("sl-warn", Boolean(memory.above));
  ui.bars.setAttribute("aria-label", memory.words || "Memory");
  legendOf(ui.legend, segments);
  say(ui.usable, memory.usable_text || ""); ui.usable.classList.toggle("sl-usablemark", memory.line !== null && memory.line !== undefined);
  ui.light.hidden = !light.level; ui.light.dataset.level = light.level || ""; say(ui.lightWord, light.word || ""); say(ui.lightReason, light.reason || "");
  ui.pool.hidden = !pool;
  if (!pool) return;
  stackBar(ui.whole, pool.segments, pool.total, null);
  say(ui.wholeText, pool.text);
  legendOf(ui.poolLegend, pool.segments);
}

/** Fills a folded list; a reader who has scrolled down stays where they are. */
function fill(list, nodes) {
  const below = list.scrollHeight - list.scrollTop, reading = list.scrollTop > 0;
  list.replaceChildren(...nodes);
  if (reading) list.scrollTop = list.scrollHeight - below;
}

function showSamples(ui, samples) {
  say(ui.samplesCount, samples.count ? samples.count.toLocaleString("en") : "none yet"); say(ui.samplesLatest, samples.latest || "");
  fill(ui.samplesList, (samples.groups || []).map(({ prompt, answers }) => {
    const group = make("div", "sl-sample");
    group.appendChild(make("div", "sl-prompt sl-text", prompt, { dir: "auto" }));
    for (const { step, text } of answers) {
      const row = group.appendChild(make("div", "sl-answer"));
      row.append(make("span", "sl-dim", step), make("div", "sl-text", text, { dir: "auto" }));
    }
    return group;
  }));
}

function showNotes(ui, notes, count) {
  say(ui.notesCount, count ? count.toLocaleString("en") : "none yet"); say(ui.notesLatest, notes.length ? notes[0].text.split("\n", 1)[0] : "");
  fill(ui.notesList, notes.map((note) => {
    const node = make("div", "sl-note");
    node.append(make("span", "sl-dim", note.time), make("span", `sl-text ${note.tone ? `sl-${note.tone}` : ""}`, note.text, { dir: "auto" }));
    return node;
  }));
}

/** The buttons: an answer at once, the worker's own when it comes, and the truth when nobody answers. */
function steer(ui, model) {
  let asked = null, timer = 0;
  const show = () => {
    const ack = model.get("ack") || {}, waiting = ack.waiting || [];
    if (asked && (ack.count || 0) > asked.count) { asked = null; clearTimeout(timer); }
    say(ui.ack, asked ? asked.text : ack.text || "");
    ui.root.dataset.ack = asked ? "asked" : ack.text ? (waiting.length ? "waiting" : "done") : "";
    const over = Boolean(model.get("head").over), busy = (command) => over || waiting.includes(command) || (asked !== null && asked.command === command);
    for (const button of Object.values(ui.buttons)) button.disabled = busy(button.dataset.command);
    ui.askButton.disabled = busy("sample"); ui.rateButton.disabled = busy("learning_rate");
  };
  const request = (command, details = {}) => {
    asked = { command, text: ASKED[command], count: (model.get("ack") || {}).count || 0 };
    clearTimeout(timer);
    timer = setTimeout(() => { if (asked) { asked.text = `${ASKED[command]} The kernel has not answered: it is busy or gone.`; show(); } }, 5000);
    model.send({ command, ...details });
    show();
  };
  for (const button of Object.values(ui.buttons)) button.addEventListener("click", () => {
    const command = button.dataset.command;
    if (command === "sample") ui.samplesFold.open = true;
    if (command === "sample" && !model.get("prompts")) { say(ui.ack, "Type what to ask, below."); ui.prompt.focus(); return; }
    request(command);
  });
  ui.form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = ui.prompt.value.trim();
    if (text) request("sample", { prompts: [text] });
  });
  const openRate = (open) => { ui.rateForm.hidden = !open; ui.learning_rate.hidden = open; ui.change.setAttribute("aria-expanded", String(open)); };
  ui.change.addEventListener("click", () => { openRate(ui.rateForm.hidden); if (!ui.rateForm.hidden) ui.rate.focus(); });
  ui.rateForm.addEventListener("submit", (event) => {
    event.preventDefault();
    const rate = Number(ui.rate.value);
    if (!(rate > 0)) { say(ui.ack, "A learning rate is a number above 0, like 1e-4."); return; }
    openRate(false); ui.change.focus();
    request("learning_rate", { learning_rate: rate });
  });
  for (const form of [ui.form, ui.rateForm]) form.addEventListener("keydown", (event) => {
    event.stopPropagation(); // letters are text here, not the notebook's shortcuts
    if (event.key === "Escape" && form === ui.rateForm) { openRate(false); ui.change.focus(); }
  });
  return { show, stop: () => clearTimeout(timer) };
}

/** The curves: keeps the rows, follows the pointer and the arrow keys; paint() draws. */
function curves(ui, model, ask) {
  const rows = new Rows(WIDTH), view = { log: false, cursor: null, over: false };
  let smoothed = new Float32Array(0), scales = null, stale = true;
  const format = (value, none = "NaN") => (!isFinite(value) ? none : Math.abs(value) < 10 ? value.toFixed(3) : String(+value.toPrecision(4)));
  const number = (value) => value.toLocaleString("en");
  const readout = () => {
    const curve = model.get("curve"), figures = model.get("figures"), steps = rows.column(STEP), chosen = view.cursor !== null && view.cursor < rows.count;
    const at = chosen ? view.cursor : rows.count - 1;
    const heldOut = chosen ? (curve.evals || []).filter(([step]) => step <= steps[at]).pop() : null;
    say(ui.raw, !rows.count ? "–" : chosen ? format(rows.column(LOSS)[at]) : figures.loss || "–");
    say(ui.smooth, rows.count ? format(smoothed[at], "–") : "–");
    say(ui.heldOut, chosen ? (heldOut ? format(heldOut[1]) : "–") : figures.held_out || "–");
    say(ui.best, curve.best ? `${format(curve.best[1])} at ${number(curve.best[0])}` : "–");
    ui.heldOutKey.hidden = ui.bestKey.hidden = !(curve.evals || []).length;
    const from = at > 0 ? steps[at - 1] + 1 : steps[at];
    say(ui.at, !chosen ? "" : rows.stride === 1 ? `at step ${number(steps[at])}` : `steps ${number(from)}–${number(steps[at])}: ${format(rows.column(LOW)[at])} to ${format(rows.column(HIGH)[at])}`);
    ui.plot.setAttribute("aria-label", `Loss over ${number(rows.count ? steps[rows.count - 1] : 0)} steps: training ${ui.raw.textContent}, smoothed ${ui.smooth.textContent}, held-out ${ui.heldOut.textContent}. ${ui.at.textContent} Arrow keys read single steps.`);
  };
  const paint = () => {
    const curve = model.get("curve"), head = model.get("head"), over = 2 ** Number(ui.smoothing.value) * (curve.window || 1);
    view.over = Boolean(head.over);
    if (stale) smoothed = smooth(rows.column(LOSS), rows.count, 1 - 1 / Math.max(1, over / rows.stride));
    stale = false;
    ui.smoothing.setAttribute("aria-valuetext", over / rows.stride <= 1 ? "none" : `over ${number(Math.round(over))} updates`);
    readout();
    scales = drawLoss(ui.plot, ui.root, rows, curve, smoothed, view);
    for (const [key, , , columns] of TILES) if (columns) drawStrip(ui.strips[key], ui.root, rows, ...columns, ...(key === "grad_norm" ? [model.get("clip")] : []));
    ui.root.dataset.rows = String(Math.min(rows.count * rows.stride, head.updates || 0)); ui.root.dataset.points = String(rows.count);
  };
  const changed = () => { stale = true; ask(); };
  const point = (index) => { view.cursor = index === null || !rows.count ? null : Math.max(0, Math.min(rows.count - 1, index)); ask(); };
  ui.plot.addEventListener("pointermove", (event) => scales && point(nearest(rows.column(STEP), rows.count, scales.step(event.offsetX))));
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
  ui.smoothing.addEventListener("input", changed);
  ui.smoothing.addEventListener("keydown", (event) => event.stopPropagation());
  const load = () => {
    const bytes = model.get("history");
    rows.clear(); rows.stride = model.get("head").stride || 1;
    if (bytes && bytes.byteLength) rows.append(bytes);
    changed();
  };
  const message = (content, buffers) => {
    if (content.kind !== "rows") return;
    if (content.from > rows.count) { model.send({ command: "history" }); return; } // a gap: this page came late
    if (content.from === 0) rows.clear();
    rows.count = content.from; rows.stride = content.stride; // the last row may have grown
    if (buffers && buffers[0]) rows.append(buffers[0]);
    changed();
  };
  const catchUp = () => { if ((model.get("head").rows || 0) !== rows.count) model.send({ command: "history" }); };
  load();
  return { paint, message, load, catchUp };
}

/** Builds the panel and keeps it up to date; returns its root and how to end it. */
function live(model) {
  const root = make("div", "sparklab", "", { role: "group", "aria-label": "Training run" });
  const ui = layout(root), fresh = new Set(), page = Math.random().toString(36).slice(2);
  const show = {
    head: () => { showHead(ui, model.get("head"), model.get("name")); buttons.show(); },
    figures: () => showFigures(ui, model.get("figures")),
    memory: () => showMemory(ui, model.get("memory")),
    samples: () => showSamples(ui, model.get("samples")),
    notes: () => showNotes(ui, model.get("notes"), model.get("head").notes || 0),
  };
  const paint = () => { for (const name of fresh) show[name](); fresh.clear(); plot.paint(); };
  const canvas = painter(root, paint, (seen) => model.send({ command: "seen", page, seen }));
  const plot = curves(ui, model, canvas.ask), buttons = steer(ui, model);
  const changes = {};
  for (const name of Object.keys(show)) changes[name] = () => { fresh.add(name); canvas.ask(); };
  Object.assign(changes, { ack: buttons.show, curve: canvas.ask, history: plot.load });
  for (const [name, change] of Object.entries(changes)) model.on(`change:${name}`, change);
  for (const name of Object.keys(show)) show[name]();
  buttons.show();
  model.on("msg:custom", plot.message);
  plot.catchUp();
  const resize = new ResizeObserver(canvas.ask);
  resize.observe(ui.plot);
  const offTheme = onTheme(canvas.ask);
  const stop = () => {
    for (const [name, change] of Object.entries(changes)) model.off(`change:${name}`, change);
    model.off("msg:custom", plot.message);
    resize.disconnect(); offTheme(); canvas.stop(); buttons.stop();
  };
  return { root, stop };
}

export default resident(live);

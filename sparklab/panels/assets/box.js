// The box, live. The kernel computes every word and figure; this file lays them out where the static twin stands.

function boxLayout(root) {
  const ui = {};
  const add = (parent, name, tag, className, text, attributes) => (ui[name] = parent.appendChild(make(tag, className, text, attributes)));
  const who = root.appendChild(make("div", "sl-who"));
  add(who, "dot", "span", "sl-dot", "", { "aria-hidden": "true" });
  add(who, "word", "b", "sl-word", "", { role: "status", "aria-live": "polite" });
  add(who, "name", "span", "sl-name", "", { dir: "auto" });
  add(who, "about", "span", "sl-dim");
  add(root, "reason", "div", "sl-line");
  add(root, "bar", "div", "sl-pool", "", { role: "img" });
  add(root, "legend", "div", "sl-legend");
  add(root, "line", "div", "sl-legend sl-usablekey");
  const figures = (ui.figures = root.appendChild(make("div", "sl-figures sl-boxfigures")));
  ui.tiles = [];
  ui.trail = make("canvas", "sl-strip", "", { "aria-hidden": "true" });
  ui.tile = () => {
    const tile = figures.appendChild(make("div", "sl-tile"));
    const entry = { name: tile.appendChild(make("div", "sl-dim")), text: tile.appendChild(make("div", "sl-figure")) };
    if (!ui.tiles.length) tile.appendChild(ui.trail);
    ui.tiles.push(entry);
  };
  add(root, "findings", "div", "sl-findings");
  return ui;
}

/** What was available over the last looks, up to the whole pool. */
function drawTrail(ui, view, root) {
  const surface = canvasContext(ui.trail);
  if (!surface) return;
  const { context, width, height } = surface, values = view.trail.map((value) => (value === null ? NaN : value));
  const X = (index) => width - 1 - (values.length - 1 - index) * (width / 120), Y = (value) => height - 1 - (height - 2) * Math.min(1, value / (view.scale || 1));
  strokeCurve(context, values.map((_, index) => index), values, values.length, X, Y, getComputedStyle(root).getPropertyValue("--sl-fg").trim(), 1.25, 0.6);
}

function showBox(ui, root, view) {
  root.dataset.tone = view.level;
  say(ui.word, view.word); say(ui.name, view.name); say(ui.about, view.about); say(ui.reason, view.reason);
  ui.bar.hidden = !view.segments.length;
  stackBar(ui.bar, view.segments, view.scale, view.line);
  ui.bar.setAttribute("aria-label", view.words);
  legendOf(ui.legend, view.segments);
  legendOf(ui.line, view.line_words ? [{ name: view.line_words, text: "", colour: "var(--sl-bad)" }] : []);
  while (ui.tiles.length < view.figures.length) ui.tile();
  for (const [index, { name, text }] of view.figures.entries()) { say(ui.tiles[index].name, name); say(ui.tiles[index].text, text); }
  ui.findings.replaceChildren(...(view.findings || []).map(({ level, fact, fix }) => {
    const row = make("div", `sl-trouble sl-finding sl-finding-${level}`);
    row.append(make("div", "sl-text", fact, { dir: "auto" }));
    if (fix) row.append(make("div", "sl-text sl-dim", fix, { dir: "auto" }));
    return row;
  }));
  drawTrail(ui, view, root);
}

function liveBox(model) {
  const root = make("div", "sparklab sl-box", "", { role: "group", "aria-label": "This box" });
  const ui = boxLayout(root);
  const show = () => { showBox(ui, root, model.get("view")); root.dataset.looks = model.get("view").trail.length; };
  model.on("change:view", show);
  show();
  const stops = [lookAt(model, root), onTheme(show)], sizes = new ResizeObserver(show);
  sizes.observe(root);
  return { root, stop: () => { model.off("change:view", show); sizes.disconnect(); for (const stop of stops) stop(); } };
}

export default resident(liveBox);

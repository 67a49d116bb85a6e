// The plan with sliders. The kernel computes every word and figure; this file lays them out where the static twin stands, and passes choices on.

function planLayout(root, scales) {
  const ui = { rows: {} };
  const add = (parent, name, tag, className, text, attributes) => (ui[name] = parent.appendChild(make(tag, className, text, attributes)));
  const who = root.appendChild(make("div", "sl-who"));
  add(who, "name", "b", "sl-word", "", { dir: "auto" });
  add(who, "about", "span", "sl-dim");
  const group = `sl-method-${Math.random().toString(36).slice(2)}`;
  const methods = root.appendChild(make("div", "sl-methods", "", { role: "radiogroup", "aria-label": "Method" }));
  for (const method of scales.methods) {
    const row = methods.appendChild(make("label", "sl-choice"));
    const radio = row.appendChild(make("input", "", "", { type: "radio", name: group, value: method }));
    row.appendChild(make("b", "", method));
    const verdict = row.appendChild(make("span", "sl-dim"));
    const bar = row.appendChild(make("div", "sl-stack sl-planbar", "", { role: "img" }));
    ui.rows[method] = { row, radio, verdict, bar };
  }
  add(root, "usable", "div", "sl-legend sl-usablekey");
  const sliders = root.appendChild(make("div", "sl-sliders"));
  for (const [name, label, most] of [["tokens", "Tokens a row", scales.tokens.length - 1], ["rank", "Rank", scales.ranks.length - 1], ["layers", "Layers that recompute", scales.layers]]) {
    const slider = sliders.appendChild(make("label", "sl-slider"));
    const head = slider.appendChild(make("span", "sl-sliderhead"));
    head.appendChild(make("span", "sl-dim", label));
    const value = head.appendChild(make("output", "", "", { "aria-hidden": "true" }));
    ui[name] = slider.appendChild(make("input", "", "", { type: "range", min: "0", max: String(most), step: "1", "aria-label": label }));
    ui[`${name}Value`] = value;
  }
  add(root, "summary", "div", "sl-summary", "", { role: "status", "aria-live": "polite" });
  add(root, "speed", "div", "");
  add(root, "fixes", "div", "sl-text");
  add(root, "legend", "div", "sl-legend");
  const fold = root.appendChild(make("details", "sl-fold"));
  fold.appendChild(make("summary", "", "")).appendChild(make("b", "", "Where each line comes from"));
  add(fold, "moment", "div", "sl-dim");
  add(fold, "lines", "div", "sl-lines");
  add(root, "notes", "div", "sl-plannotes sl-dim");
  return ui;
}

function planEntry(colour, name, text) {
  const node = make("span", "sl-entry"), square = node.appendChild(make("span", "sl-swatch"));
  square.style.background = colour;
  node.append(make("span", "", name), make("span", "sl-dim", text));
  return node;
}

function showPlan(ui, view, choice) {
  const share = (gib) => `${100 * gib / (view.scale || 1)}%`;
  for (const row of view.methods) {
    const { bar, verdict, row: label, radio } = ui.rows[row.method];
    say(verdict, `${row.peak}, ${row.verdict}`);
    label.classList.toggle("sl-over", !row.fits);
    radio.checked = row.method === choice.method;
    const planned = make("div", "sl-planned");
    for (const part of row.segments) {
      const node = planned.appendChild(make("div"));
      node.style.width = share(part.gib); node.style.background = part.colour; node.title = `${part.name}: ${part.text}`;
    }
    bar.replaceChildren(planned);
    bar.classList.toggle("sl-cut", row.gib > view.scale);
    if (view.usable !== null) bar.appendChild(make("div", "sl-usable")).style.left = share(view.usable);
    bar.setAttribute("aria-label", row.words);
    if (row.method === choice.method) ui.legend.replaceChildren(...row.segments.map((part) => planEntry(part.colour, part.name, part.text)));
  }
  ui.usable.replaceChildren(planEntry("var(--sl-bad)", view.usable_text, ""));
  say(ui.summary, view.summary); say(ui.speed, view.speed); say(ui.fixes, view.fixes); say(ui.moment, view.moment);
  ui.fixes.hidden = !view.fixes;
  ui.lines.replaceChildren(...view.lines.flatMap((line) => {
    const square = make("span", "sl-swatch"); square.style.background = line.colour;
    return [square, make("span", "", line.name), make("span", "sl-size", line.size), make("span", "sl-dim sl-text", line.formula)];
  }));
  ui.notes.replaceChildren(...view.notes.map((note) => make("div", "", `Note: ${note}`)));
}

/** The sliders: what they say is shown at once, the figures follow from the kernel. */
function planControls(ui, model, scales) {
  const read = () => ({
    method: scales.methods.find((method) => ui.rows[method].radio.checked) || scales.methods[0],
    tokens: scales.tokens[Number(ui.tokens.value)], rank: scales.ranks[Number(ui.rank.value)], layers: Number(ui.layers.value),
  });
  const label = () => {
    const { method, tokens, rank, layers } = read();
    const words = { tokens: tokens.toLocaleString("en"), rank: method === "full" ? "no adapters" : String(rank), layers: `${layers} of ${scales.layers}` };
    for (const [name, text] of Object.entries(words)) { say(ui[`${name}Value`], text); ui[name].setAttribute("aria-valuetext", text); }
    ui.rank.disabled = method === "full";
  };
  const choice = model.get("choice");
  ui.tokens.value = String(scales.tokens.indexOf(choice.tokens)); ui.rank.value = String(scales.ranks.indexOf(choice.rank)); ui.layers.value = String(choice.layers);
  ui.rows[choice.method].radio.checked = true;
  label();
  const move = () => { label(); model.set("choice", read()); model.save_changes(); };
  const rest = () => { model.set("settled", model.get("settled") + 1); model.save_changes(); };
  for (const input of [ui.tokens, ui.rank, ui.layers, ...scales.methods.map((method) => ui.rows[method].radio)]) {
    input.addEventListener("input", move);
    input.addEventListener("change", rest);
    input.addEventListener("keydown", (event) => event.stopPropagation()); // arrows move the slider, not the notebook's selection
  }
  return read;
}

function livePlan(model) {
  const scales = model.get("scales");
  const root = make("div", "sparklab sl-plan", "", { role: "group", "aria-label": "Plan" });
  const ui = planLayout(root, scales), read = planControls(ui, model, scales);
  const [name, about] = model.get("name");
  say(ui.name, name); say(ui.about, about);
  const show = () => { showPlan(ui, model.get("view"), read()); root.dataset.seen = JSON.stringify(model.get("view").settings); };
  model.on("change:view", show);
  show();
  return { root, stop: () => model.off("change:view", show) };
}

export default resident(livePlan);

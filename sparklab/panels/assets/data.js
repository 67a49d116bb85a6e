// The data as the model will see it. The kernel counts and decodes; this file lays it out and asks for other pages. Text of records enters as textContent only.

function dataLayout(root) {
  const ui = {};
  const add = (parent, name, tag, className, text, attributes) => (ui[name] = parent.appendChild(make(tag, className, text, attributes)));
  const who = root.appendChild(make("div", "sl-who"));
  who.appendChild(make("span", "sl-dot"));
  add(who, "word", "b", "sl-word", "", { role: "status" });
  add(who, "name", "span", "sl-name", "", { dir: "auto" });
  add(who, "about", "span", "sl-dim", "", { dir: "auto" });
  add(root, "refusals", "div", "");
  add(root, "findings", "div", "sl-findings", "", { role: "list", "aria-label": "Warnings" });
  add(root, "figures", "div", "sl-figures");
  const lengths = add(root, "lengths", "div", "sl-section");
  const heading = lengths.appendChild(make("div", "sl-heading"));
  heading.appendChild(make("b", "", "Lengths"));
  add(heading, "lengthWords", "span", "sl-value");
  add(lengths, "histogram", "div", "sl-histogram", "", { role: "img" });
  const ends = lengths.appendChild(make("div", "sl-ends"));
  add(ends, "from", "span"); add(ends, "to", "span");
  add(root, "scripts", "div", "sl-dim");
  ui.scripts.style.marginTop = "8px";
  const pager = add(root, "pager", "div", "sl-pager", "", { role: "group", "aria-label": "Records" });
  pager.appendChild(make("b", "", "Records"));
  add(pager, "filter", "select", "", "", { "aria-label": "Which records" });
  add(pager, "previous", "button", "sl-button sl-small", "‹ Previous", { type: "button" });
  add(pager, "next", "button", "sl-button sl-small", "Next ›", { type: "button" });
  add(pager, "place", "span", "sl-dim", "", { "aria-live": "polite" });
  const marks = pager.appendChild(make("span", "sl-marks", "", { "aria-label": "How tokens are marked" }));
  marks.append(make("span", "sl-tok-l", "learned"), make("span", "", "only read"), make("bdi", "sl-tok-special", "<|special|>"), make("span", "sl-tok-x", "beyond max_length"));
  add(root, "records", "div", "", "", { role: "list", "aria-label": "Records as tokens" });
  return ui;
}

function showData(ui, root, view, show) {
  root.dataset.tone = view.tone;
  say(ui.word, view.word); say(ui.name, view.name); say(ui.about, view.about);
  ui.refusals.replaceChildren(...view.refusals.map((one) => {
    const node = make("div", "sl-trouble");
    node.appendChild(make("div", "sl-text", one.fact, { dir: "auto" }));
    if (one.fix) node.appendChild(make("div", "sl-text sl-dim", `Fix: ${one.fix}`, { dir: "auto" }));
    return node;
  }));
  const offered = new Set(view.filters.map((one) => one.name));
  ui.findings.replaceChildren(...view.findings.map((one) => {
    const node = make("div", "sl-finding", "", { role: "listitem" });
    node.appendChild(make("span", "", one.words, { dir: "auto" }));
    if (one.filter !== "all" && offered.has(one.filter)) {
      const button = node.appendChild(make("button", "sl-button sl-small", "Show", { type: "button", "aria-label": `Show: ${one.words}` }));
      button.addEventListener("click", () => show(one.filter, 0));
    }
    return node;
  }));
  ui.figures.replaceChildren(...view.figures.map((one) => {
    const tile = make("div", "sl-tile");
    tile.append(make("div", "sl-dim", one.name), make("div", "sl-figure", one.value), make("div", "sl-dim sl-tilenote", one.note));
    return tile;
  }));
  ui.lengths.hidden = view.bars.length === 0;
  say(ui.lengthWords, view.bars_words.split(": ").slice(-1)[0]);
  ui.histogram.setAttribute("aria-label", view.bars_words);
  ui.histogram.replaceChildren(...view.bars.map((bar) => {
    const node = make("div", bar.long ? "sl-beyond" : "", "", { title: bar.words });
    node.style.height = bar.height > 0 ? `max(2px, ${100 * bar.height}%)` : "0";
    return node;
  }));
  if (view.bars.length) { say(ui.from, view.bars[0].from); say(ui.to, view.bars_to); }
  say(ui.scripts, `Scripts: ${view.scripts}`);
  ui.filter.replaceChildren(...view.filters.map((one) => make("option", "", one.words, { value: one.name })));
  ui.pager.hidden = view.filters.length === 0;
}

function pieceNode(piece) {
  const names = piece.k === "text" ? [] : [`sl-tok-${piece.k}`];
  if (piece.l) names.push("sl-tok-l");
  if (piece.x) names.push("sl-tok-x");
  return make(piece.k === "text" ? "span" : "bdi", names.join(" "), piece.t);
}

function showPage(ui, root, page) {
  const last = Math.min(page.first + page.rows.length, page.total);
  ui.filter.value = page.filter;
  say(ui.place, page.total ? `${(page.first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${page.total.toLocaleString("en")}` : "none");
  ui.previous.disabled = page.first === 0;
  ui.next.disabled = last >= page.total;
  ui.records.replaceChildren(...page.rows.map((row) => {
    const [where, figures, flags] = row.head;
    const record = make("div", "sl-record", "", { role: "listitem" });
    const head = record.appendChild(make("div", "sl-recordhead"));
    head.append(make("b", "", where, { dir: "auto" }), make("span", "sl-dim", figures));
    for (const flag of flags) head.appendChild(make("span", "sl-odd", flag, { dir: "auto" }));
    if (row.fix) head.appendChild(make("span", "sl-dim", `Fix: ${row.fix}`, { dir: "auto" }));
    const tokens = record.appendChild(make("div", "sl-tokens", "", { tabindex: "0", role: "group", "aria-label": `Tokens of ${where}` }));
    for (const line of row.lines) tokens.appendChild(make("div", "", "", { dir: "auto" })).append(...line.map(pieceNode));
    return record;
  }));
  root.dataset.page = `${page.filter} ${page.first}`;
}

function initialize({ model }) {
  const root = make("div", "sparklab sl-data", "", { role: "group", "aria-label": "Data" });
  const ui = dataLayout(root);
  const ask = (filter, first) => model.send({ filter, first });
  const move = (pages) => { const page = model.get("page"); ask(page.filter, page.first + pages * page.size); };
  ui.filter.addEventListener("change", () => ask(ui.filter.value, 0));
  ui.previous.addEventListener("click", () => move(-1));
  ui.next.addEventListener("click", () => move(1));
  for (const node of [ui.filter, ui.previous, ui.next, ui.records]) node.addEventListener("keydown", (event) => event.stopPropagation()); // not the notebook's shortcuts
  const view = () => { showData(ui, root, model.get("view"), ask); page(); };
  const page = () => showPage(ui, root, model.get("page"));
  model.on("change:view", view); model.on("change:page", page);
  view();
  const leave = dwell(root, model.get("home"));
  return () => { model.off("change:view", view); model.off("change:page", page); leave(); };
}

export default { initialize };

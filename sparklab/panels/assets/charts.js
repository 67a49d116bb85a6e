// The run panel's charts: loss with all that belongs to it, and the strips. A row is a stretch of updates: see series.py.

const STEP = 0, LOSS = 1, LOW = 2, HIGH = 3, BROKEN = 4, RATE = 5, NORM = 6, PEAK = 7, SPEED = 8, WIDTH = 9;

/** The scales of the loss chart for what there is to show, or null for nothing. */
function lossScales(rows, curve, view, width, height) {
  const left = 46, right = width - 10, top = 8, bottom = height - 24, xs = rows.column(STEP), evals = curve.evals || [];
  if (!rows.count && !evals.length) return null;
  const held = evals.map(([, loss]) => loss);
  let [low, high] = extent(rows.column(LOW), rows.column(HIGH), held);
  const log = view.log && high > 0;
  if (log) low = Math.max(leastPositive(rows.column(LOW), held), high * 1e-9);
  const marks = log ? logTicks(low, high) : ticks(low, high);
  const bend = log ? (value) => Math.log(Math.max(value, marks[0])) : (value) => value;
  const floor = bend(marks[0]), ceiling = bend(marks[marks.length - 1]);
  const last = Math.max(rows.count ? xs[rows.count - 1] : 0, evals.length ? evals[evals.length - 1][0] : 0);
  const end = view.over ? Math.max(last, 1) : axisEnd(last, curve.steps);
  return {
    left, right, top, bottom, marks, log, end, evals, held,
    X: (step) => left + (right - left) * step / end,
    Y: (value) => top + (bottom - top) * (1 - (bend(value) - floor) / (ceiling - floor || 1)),
    step: (pixel) => (pixel - left) / (right - left) * end,
  };
}

/** Draws the loss chart; returns its scales for hovering, or null while there is nothing. */
function drawLoss(canvas, root, rows, curve, smoothed, view) {
  const surface = canvasContext(canvas);
  if (!surface) return null;
  const { context, width, height } = surface, style = getComputedStyle(root);
  const colour = (name) => style.getPropertyValue(`--sl-${name}`).trim();
  context.font = `11px ${style.fontFamily}`;
  const scales = lossScales(rows, curve, view, width, height);
  if (!scales) {
    context.fillStyle = colour("fg"); context.globalAlpha = 0.08; // an empty chart is a chart
    for (let line = 0; line < 4; line++) context.fillRect(46, Math.round(8 + (height - 32) * line / 3), width - 56, 1);
    context.globalAlpha = 1; context.fillStyle = colour("dim"); context.textAlign = "center";
    context.fillText(view.over ? "No step was made." : "The curve begins with the first step.", width / 2, height / 2 - 4);
    return null;
  }
  const { X, Y, bottom, evals, held } = scales, xs = rows.column(STEP);
  drawAxes(context, scales, colour);
  drawRaw(context, rows, X, Y, colour("loss"), rows.count < (scales.right - scales.left) / 2 ? 0.5 : 0.3);
  strokeCurve(context, xs, smoothed, rows.count, X, Y, colour("bg"), 4.5, 0.75); // a rim that lifts the bold curve off the raw one
  strokeCurve(context, xs, smoothed, rows.count, X, Y, colour("loss"), 2, 1);
  strokeCurve(context, evals.map(([step]) => step), held, held.length, X, Y, colour("held-out"), 1, 0.6);
  const dot = (x, y, radius, fill) => { context.fillStyle = fill; context.beginPath(); context.arc(x, y, radius, 0, 7); context.fill(); };
  const radius = evals.length > 60 ? 2 : 3.5;
  for (const [step, loss] of evals) dot(X(step), Y(loss), radius, colour("held-out"));
  if (curve.best) { dot(X(curve.best[0]), Y(curve.best[1]), 6, colour("held-out")); dot(X(curve.best[0]), Y(curve.best[1]), 3.5, colour("good")); }
  context.fillStyle = colour("bad");
  const broken = rows.column(BROKEN);
  for (let index = 0; index < rows.count; index++) if (broken[index] > 0) context.fillRect(X(xs[index]) - 1, bottom - 8, 2, 8);
  if (view.cursor !== null && view.cursor < rows.count) {
    const x = Math.round(X(xs[view.cursor])) + 0.5;
    context.strokeStyle = colour("dim"); context.lineWidth = 1;
    context.beginPath(); context.moveTo(x, scales.top); context.lineTo(x, bottom); context.stroke();
    if (isFinite(smoothed[view.cursor])) dot(x, Y(smoothed[view.cursor]), 4, colour("loss"));
  }
  return scales;
}

/** The raw losses: a line while each row is one update, else the band from the lowest to the highest. */
function drawRaw(context, rows, X, Y, colour, alpha) {
  const xs = rows.column(STEP), low = rows.column(LOW), high = rows.column(HIGH);
  if (rows.stride === 1) { strokeCurve(context, xs, low, rows.count, X, Y, colour, 1, alpha); return; }
  const twice = new Float32Array(rows.count * 2), both = new Float32Array(rows.count * 2);
  for (let index = 0; index < rows.count; index++) {
    twice[2 * index] = twice[2 * index + 1] = xs[index];
    both[2 * index] = low[index]; both[2 * index + 1] = high[index];
  }
  strokeCurve(context, twice, both, rows.count * 2, X, Y, colour, 1, alpha);
}

/** One figure over the whole run, from zero to its highest; line: a value to mark across, where it lies inside. */
function drawStrip(canvas, root, rows, index, over = index, line = null) {
  const surface = canvasContext(canvas);
  if (!surface || !rows.count) return;
  const { context, width, height } = surface, values = rows.column(index), peaks = rows.column(over), xs = rows.column(STEP), style = getComputedStyle(root);
  const sorted = Float32Array.from(peaks.filter(isFinite)).sort(); // a single spike must not flatten the rest
  const usual = sorted.length ? sorted[Math.floor(0.98 * (sorted.length - 1))] : 1;
  const high = Math.max(Math.min(sorted[sorted.length - 1] || 1, usual * 2), line !== null && line < usual * 2 ? line * 1.08 : 0) || 1;
  const first = xs[0], span = Math.max(1, xs[rows.count - 1] - first);
  const X = (step) => 1 + (width - 2) * (step - first) / span, Y = (value) => height - 2 - (height - 4) * Math.min(1, value / high);
  if (over !== index) strokeCurve(context, xs, peaks, rows.count, X, Y, style.getPropertyValue("--sl-fg").trim(), 1, 0.2);
  strokeCurve(context, xs, values, rows.count, X, Y, style.getPropertyValue("--sl-fg").trim(), 1.25, 0.55);
  if (line !== null && line <= high) {
    context.strokeStyle = style.getPropertyValue("--sl-bad").trim(); context.lineWidth = 1; context.setLineDash([3, 3]); context.globalAlpha = 0.8;
    context.beginPath(); context.moveTo(0, Y(line)); context.lineTo(width, Y(line)); context.stroke();
    context.setLineDash([]); context.globalAlpha = 1;
  }
}

"""The script and the style of ``compare_page``, as text."""

SCRIPT = """
(() => {
const el = id => document.getElementById(id);
const {runs, panels, box: [W, H, L, R, T, B], colours} = JSON.parse(el("data").textContent);
const AXES = ["steps", "tokens", "hours"];
const state = {axis: 0, smooth: 0, log: false, on: runs.map(() => true)};
function node(name, attributes, text) {
  const made = document.createElementNS(document.querySelector("svg").namespaceURI, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}
function say(v, unit) {
  if (v === null || v === undefined) return "–";
  if (unit === "share") return (100 * v).toFixed(1) + " %";
  if (unit === "bytes") return (v / 1e9).toFixed(2) + " GB";
  const size = Math.abs(v);
  if (size >= 1000) return Math.round(v).toLocaleString("en-US");
  if (size && size < 1e-3) return v.toExponential(2);
  return String(+v.toPrecision(4));
}
function tick(v, unit) {
  if (unit === "share") return +(100 * v).toPrecision(3) + " %";
  if (unit === "bytes") return +(v / 1e9).toPrecision(3) + " GB";
  const size = Math.abs(v);
  if (size >= 1e9) return +(v / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return +(v / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(v / 1e3).toPrecision(3) + "k";
  if (size && size < 1e-3) return (+v.toPrecision(3)).toExponential();
  return String(+v.toPrecision(4));
}
function ticks(low, high, want) {
  const raw = (high - low) / want, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(n => n * power).find(s => s >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}
function logTicks(low, high) {
  const found = [], decades = Math.log10(high / low);
  if (decades < 0.7) return ticks(low, high, 4);
  const parts = decades > 3 ? [1] : decades > 1 ? [1, 3] : [1, 2, 3, 5, 7];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
    for (const n of parts) if (n * 10 ** p >= low && n * 10 ** p <= high) found.push(n * 10 ** p);
  return found;
}
function curve(run, key) {
  const grid = run.grids.find(g => key in g.series);
  if (!grid) return [];
  const points = [];
  grid.series[key].forEach((y, i) => {
    if (y === null || (state.log && y <= 0)) return;
    points.push({x: grid.at[state.axis][i], y, stage: grid.stage[i]});
  });
  // The mean of as many points to either side, in its stage: smooth, and no step later than what it shows.
  // Near the beginning, where curves fall, the window is narrow; at the end it only loses its later half.
  const wide = panels[key].exact ? 0 : Math.round(points.length * state.smooth / 200);
  const sums = [0];
  points.forEach((point, i) => sums.push(sums[i] + point.y));
  for (let begin = 0, end; begin < points.length; begin = end) {
    for (end = begin; end < points.length && points[end].stage === points[begin].stage;) end++;
    for (let i = begin; i < end; i++) {
      const side = Math.min(wide, i - begin), last = Math.min(i + side, end - 1);
      points[i].s = side ? (sums[last + 1] - sums[i - side]) / (last + 1 - i + side) : points[i].y;
    }
  }
  return points;
}
function range(curves, zero) {
  const all = curves.flat().map(p => p.y).sort((a, b) => a - b);
  if (!all.length) return [0, 1];
  let low = all[0], high = all[all.length - 1];
  if (state.log) return low < high ? [low, high] : [low / 2, low * 2];
  // A first step far above the rest would press the curves to the floor.
  const most = all[Math.floor(0.985 * (all.length - 1))];
  if (high - low > 1.6 * (most - low) && most > low) high = most;
  if (zero) low = Math.min(0, low);
  if (high === low) { high += Math.abs(high) / 2 || 1; if (!zero) low -= Math.abs(low) / 2; }
  const room = 0.04 * (high - low);
  return [zero && low === 0 ? 0 : low - room, high + room];
}
function draw(figure) {
  const key = figure.dataset.key, {unit, zero} = panels[key], svg = figure.querySelector("svg");
  const curves = runs.map((run, n) => state.on[n] ? curve(run, key) : []);
  const right = Math.max(...runs.map((run, n) => state.on[n]
    ? Math.max(0, ...run.grids.map(g => g.at[state.axis][g.at[state.axis].length - 1] || 0)) : 0)) || 1;
  const [low, high] = range(curves, zero);
  const px = x => L + x / right * (W - L - R);
  const part = state.log ? y => Math.log(y / low) / Math.log(high / low) : y => (y - low) / (high - low);
  const py = y => T + (1 - Math.min(1, Math.max(0, part(y)))) * (H - T - B);
  const g = node("g", {});
  for (const y of state.log ? logTicks(low, high) : ticks(low, high, 5)) {
    g.append(node("path", {class: "grid", d: `M${L} ${py(y).toFixed(1)}H${W - R}`}));
    g.append(node("text", {x: L - 6, y: (py(y) + 4).toFixed(1), "text-anchor": "end"}, tick(y, unit)));
  }
  for (const x of ticks(0, right, 5)) {
    const end = px(x) > W - R - 16;
    const at = {x: end ? W - R : px(x).toFixed(1), y: H - 8, "text-anchor": end ? "end" : "middle"};
    g.append(node("text", at, tick(x, "")));
  }
  const borders = new Map();
  runs.forEach((run, n) => state.on[n] && run.stages.length > 1 && run.stages.forEach(stage => {
    const at = px(stage.at[state.axis]).toFixed(1);
    if (!borders.has(at)) borders.set(at, new Set());
    borders.get(at).add(stage.name);
  }));
  let free = -1;
  for (const [at, names] of [...borders].sort((a, b) => a[0] - b[0])) {
    if (+at > L + 1) g.append(node("path", {class: "border", d: `M${at} ${T}V${H - B}`}));
    const text = [...names].join(", ");
    if (+at >= free && +at + 5.5 * text.length < W) {
      g.append(node("text", {class: "stage", x: +at + 3, y: T - 5}, text));
      free = +at + 3 + 6.2 * text.length;
    }
  }
  const path = (points, value) => points.map((p, i) => (i && points[i - 1].stage === p.stage ? "L" : "M")
    + px(p.x).toFixed(1) + " " + py(value(p)).toFixed(1)).join("");
  curves.forEach((points, n) => {
    if (!points.length) return;
    const look = `c${n % colours} d${Math.floor(n / colours) % 3}`;
    if (points.length === 1) {
      g.append(node("circle", {class: look, cx: px(points[0].x), cy: py(points[0].s), r: 3}));
    }
    const raw = {class: look + " raw", d: path(points, p => p.y)};
    if (points.some(p => p.s !== p.y)) g.append(node("path", raw));
    g.append(node("path", {class: look, d: path(points, p => p.s)}));
  });
  svg.querySelectorAll("g").forEach(old => old.remove());
  svg.append(g);
  const title = figure.querySelector("strong").textContent;
  svg.querySelector("title").textContent = title + " over " + AXES[state.axis];
  figure.shown = {curves, px, py, right, unit};
  read(figure, null);
}
function read(figure, x) {
  const {curves, px, py, unit} = figure.shown, svg = figure.querySelector("svg");
  svg.querySelectorAll(".cross").forEach(old => old.remove());
  const cross = node("g", {class: "cross"});
  if (x !== null) cross.append(node("path", {d: `M${px(x).toFixed(1)} ${T}V${H - B}`}));
  figure.querySelectorAll(".key").forEach(key => {
    const n = +key.dataset.run, points = curves[n];
    key.hidden = !points.length;
    if (!points.length) return;
    let point = points[points.length - 1];
    if (x !== null) {
      for (const p of points) if (Math.abs(p.x - x) < Math.abs(point.x - x)) point = p;
      cross.append(node("circle", {class: `c${n % colours}`, cx: px(point.x), cy: py(point.s), r: 3}));
    }
    key.querySelector("b").textContent = say(point.s, unit);
  });
  const place = x === null ? "" : [`at step ${say(Math.round(x))}`, `at ${tick(x)} tokens`, `at ${say(x)} h`];
  figure.querySelector(".at").textContent = x === null ? "" : place[state.axis];
  svg.append(cross);
}
const figures = [...document.querySelectorAll(".panel")];
figures.forEach(figure => {
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointermove", event => {
    const seen = svg.getBoundingClientRect();
    const share = ((event.clientX - seen.left) / seen.width * W - L) / (W - L - R);
    const at = Math.min(1, Math.max(0, share)) * figure.shown.right;
    figures.forEach(other => read(other, Math.min(at, other.shown.right)));
  });
  svg.addEventListener("pointerleave", () => figures.forEach(other => read(other, null)));
});
function change() {
  state.axis = +el("axis").value; state.smooth = +el("smooth").value; state.log = el("log").checked;
  document.querySelectorAll(".controls [data-run]").forEach(box => {
    state.on[+box.dataset.run] = box.checked;
  });
  figures.forEach(draw);
}
document.querySelector(".controls").addEventListener("input", change);
change();
})();
"""

# Okabe and Ito's colours; yellow and black are left out: one is too pale on white, the other is the ink.
STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1c1d20;--muted:#62656d;--rule:#e1e2de;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b8578f;--c4:#c98a00;--c5:#3f9bd1;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#15171b;--card:#1d2025;--ink:#e9eaec;--muted:#9ea3ad;
--rule:#31353d;--c0:#4aa8e0;--c1:#ff8a3d;--c2:#2cc79b;--c3:#e39bc6;--c4:#f0b93a;--c5:#9ad4f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1440px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:28px;line-height:1.2;margin:0 0 16px;letter-spacing:-.01em}
h2{font-size:20px;margin:36px 0 8px}
.muted{color:var(--muted);font-size:14px;font-weight:400}
.controls{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center;
padding:10px 0;background:var(--paper);border-bottom:1px solid var(--rule);font-size:15px}
.controls label{display:inline-flex;align-items:center;gap:6px}
.run span{overflow-wrap:anywhere}.tools{display:inline-flex;flex-wrap:wrap;gap:8px 20px;margin-left:auto}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr));gap:12px}
.panel{margin:0;padding:12px 12px 4px;background:var(--card);border:1px solid var(--rule);border-radius:10px;
min-width:0}
.panel figcaption{font-size:14px;display:flex;flex-wrap:wrap;gap:2px 12px;min-height:2.9em;align-items:start;
align-content:start}
.key{white-space:nowrap;font-variant-numeric:tabular-nums}
.key[hidden]{display:none}.at:empty{display:none}
.swatch{display:inline-block;width:16px;height:0;border-top:3px solid;margin-right:6px;vertical-align:middle}
svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{font-size:11px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg path,polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg circle{fill:currentColor}
svg .raw{stroke-width:1;opacity:.28}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .border{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3;opacity:.7}
.cross path{stroke:var(--muted);stroke-width:1}.cross{pointer-events:none}
.c0{color:var(--c0);stroke:var(--c0)}.c1{color:var(--c1);stroke:var(--c1)}
.c2{color:var(--c2);stroke:var(--c2)}.c3{color:var(--c3);stroke:var(--c3)}
.c4{color:var(--c4);stroke:var(--c4)}.c5{color:var(--c5);stroke:var(--c5)}
.d1{stroke-dasharray:6 3}.d2{stroke-dasharray:2 3}.swatch.d1{border-top-style:dashed}
.swatch.d2{border-top-style:dotted}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:15px;font-variant-numeric:tabular-nums}
th,td{padding:5px 24px 5px 0;text-align:left;border-bottom:1px solid var(--rule);font-weight:400;
vertical-align:top;overflow-wrap:break-word;max-width:44ch}
thead th{font-weight:600}tbody th{color:var(--muted);white-space:nowrap;max-width:none}
.part th{font-weight:600;color:var(--ink);padding-top:16px}
@media print{.controls{position:static}}
"""

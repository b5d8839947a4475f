"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777"];

// ---------------------------------------------------------------------------------------------------- elements

/** An element with attributes, listeners (on...) and children; texts are never read as markup. */
function make(tag, attributes, ...children) {
  const space = ["svg", "polyline", "line", "text", "g"].includes(tag) ? "http://www.w3.org/2000/svg" : null;
  const made = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const short = (value) => (Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3)
  ? value.toExponential(2) : String(+value.toPrecision(4)));

// ---------------------------------------------------------------------------------------------------- curves

function smoothed(points, share) {
  let held = null;
  return points.map(([step, value]) => {
    held = held === null ? value : share * held + (1 - share) * value;
    return [step, held];
  });
}

/** One measure of all runs. */
function chart(name, lines, share, logarithmic, alarms) {
  const drawn = lines.map((line) => ({ ...line, points: smoothed(line.points, share) }));
  const scaled = (value) => (logarithmic ? Math.log10(value) : value);
  const kept = drawn.map((line) => ({ ...line, points: line.points.filter(([, v]) => !logarithmic || v > 0) }));
  const all = kept.flatMap((line) => line.points);
  if (!all.length) return null;
  const [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  const values = all.map((p) => scaled(p[1]));
  let [y0, y1] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  if (y0 === y1) { y0 -= 1; y1 += 1; }
  const [w, h, left, under] = [300, 160, 6, 14];
  const x = (step) => left + ((w - 2 * left) * (step - x0)) / Math.max(x1 - x0, 1);
  const y = (value) => h - under - ((h - under - 8) * (scaled(value) - y0)) / (y1 - y0);
  const picture = make("svg", { viewBox: `0 0 ${w} ${h}`, preserveAspectRatio: "none", role: "img", "aria-label": name });
  for (const step of alarms) picture.append(make("line", { class: "alarm", x1: x(step), x2: x(step), y1: 0, y2: h - under }));
  for (const line of kept) {
    const points = line.points.map(([s, v]) => `${x(s).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
    picture.append(make("polyline", { points, stroke: line.color }));
  }
  picture.append(make("text", { x: left, y: h - 3 }, String(x0)), make("text", { x: w - left, y: h - 3, "text-anchor": "end" }, String(x1)));
  const read = make("span", { class: "dim" }, kept.map((line) => (line.points.length ? short(line.points.at(-1)[1]) : "")).join("  "));
  picture.addEventListener("mousemove", (event) => {
    const box = picture.getBoundingClientRect();
    const step = x0 + ((event.clientX - box.left) / box.width) * (x1 - x0);
    const near = (points) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    const found = kept.filter((line) => line.points.length).map((line) => near(line.points));
    if (found.length) read.textContent = `step ${found[0][0]}: ${found.map((p) => short(p[1])).join("  ")}`;
  });
  return make("figure", { "data-measure": name }, make("figcaption", {}, make("span", {}, name), read), picture);
}

const FIRST = ["loss", "reward", "error", "instance", "prior"];
const LAST = ["lr", "grad_norm", "seconds", "reward_std"];
const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : LAST.includes(name) ? 1000 + LAST.indexOf(name) : 100);

function curves(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const shown = new Set(runs.map((_, i) => i));
  const place = make("div", { class: "charts", id: "charts" });
  const smooth = make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, id: "smooth", "aria-label": "smoothing", oninput: draw });
  const log = make("input", { type: "checkbox", id: "log", onchange: draw });
  const keys = runs.map((run, i) => make("label", { class: "key" },
    make("input", { type: "checkbox", checked: "", onchange: (e) => { if (e.target.checked) shown.add(i); else shown.delete(i); draw(); } }),
    make("i", { style: `background:${COLORS[i % COLORS.length]}` }), run.name));
  function draw() {
    const figures = names.map((name) => {
      const lines = runs.map((run, i) => ({ points: run.metrics[name] || [], color: COLORS[i % COLORS.length], i }));
      const alarms = runs.flatMap((run, i) => (shown.has(i) ? run.alarms.map((one) => one.step) : []));
      return chart(name, lines.filter((line) => shown.has(line.i) && line.points.length), +smooth.value, log.checked, alarms);
    });
    place.replaceChildren(...figures.filter(Boolean));
  }
  draw();
  if (!names.length) return make("p", { class: "dim" }, "Nothing has been logged yet.");
  return make("section", {}, make("h2", {}, "Curves"),
    make("div", { class: "bar" }, ...keys, make("label", {}, "smoothing ", smooth), make("label", {}, log, " logarithmic")), place);
}

// ---------------------------------------------------------------------------------------------------- previews

/** The previews of a run at a step, or at its last one before it. */
function previewTable(run, step) {
  const at = run.previews.filter((one) => one.step <= step).at(-1) || run.previews[0];
  if (!at) return null;
  const rows = new Map();
  for (const one of at.pictures) rows.set(one.prompt, [...(rows.get(one.prompt) || []), one]);
  const body = [...rows].map(([prompt, pictures]) => make("tr", {}, make("th", {}, run.prompts[prompt] || `prompt ${prompt}`),
    ...pictures.map((one) => make("td", {}, make("img", {
      src: one.src, alt: `${run.prompts[prompt] || ""}, seed ${one.seed}, step ${at.step}`,
      onclick: () => zoom({ src: one.src, lines: [run.prompts[prompt] || "", `seed ${one.seed}, step ${at.step}, ${run.name}`] }),
    })))));
  return make("div", {}, make("div", { class: "dim" }, `${run.name}, step ${at.step}`), make("table", { class: "previews" }, ...body));
}

function previews(runs) {
  const having = runs.filter((run) => run.previews.length);
  const steps = [...new Set(having.flatMap((run) => run.previews.map((one) => one.step)))].sort((a, b) => a - b);
  if (!steps.length) return null;
  const place = make("div", { class: "side", id: "previews" });
  const told = make("output", { for: "step" });
  const slider = make("input", { type: "range", id: "step", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1, "aria-label": "step of the previews", oninput: draw });
  function draw() {
    const step = steps[+slider.value];
    told.textContent = `step ${step}`;
    place.replaceChildren(...having.map((run) => previewTable(run, step)).filter(Boolean));
  }
  draw();
  return make("section", {}, make("h2", {}, "Previews"), make("div", { class: "bar" }, slider, told), place);
}

// ---------------------------------------------------------------------------------------------------- a run

function facts(run) {
  const folded = (title, text) => (text ? make("details", {}, make("summary", {}, title), make("pre", {}, text)) : null);
  const alarms = run.alarms.length ? make("div", { class: "alarms" }, ...run.alarms.map((one) => make("div", {}, `step ${one.step}: ${one.alarms}`))) : null;
  const both = run.beforeAfter ? make("details", {}, make("summary", {}, "before and after"), make("img", { src: run.beforeAfter, alt: "before and after", style: "max-width:100%" })) : null;
  return make("section", {}, make("h2", {}, run.name), make("div", { class: "dim" }, run.folder), alarms, both,
    folded("how well it was learnt and kept", run.judged), folded("recipe", run.recipe), folded("model card", run.card));
}

// ---------------------------------------------------------------------------------------------------- a gallery

/** Pictures of a folder; only those in sight are elements. */
function gallery(folder) {
  const scores = [...new Set(folder.pictures.flatMap((one) => Object.keys(one.scores)))].sort();
  const distinct = (name) => [...new Set(folder.pictures.map((one) => String(one[name])))];
  const choice = (name, values) => make("select", { "data-choice": name, "aria-label": name, onchange: refresh },
    make("option", { value: "" }, `every ${name}`), ...values.map((value) => make("option", { value }, value)));
  const words = make("input", { type: "search", placeholder: "words of the prompt", "data-choice": "words", "aria-label": "words of the prompt", oninput: refresh });
  const seeds = choice("seed", distinct("seed").sort((a, b) => a - b)), adapters = choice("adapter", distinct("adapter"));
  const axes = [...new Set(folder.pictures.flatMap((one) => Object.keys(one.at)))].filter((axis) => axis !== "adapter");
  const places = axes.map((axis) => choice(axis, [...new Set(folder.pictures.map((one) => one.at[axis]))]));
  const order = make("select", { "data-choice": "order", "aria-label": "order", onchange: refresh }, make("option", { value: "" }, "as drawn"),
    ...scores.flatMap((name) => [make("option", { value: `-${name}` }, `highest ${name}`), make("option", { value: `+${name}` }, `lowest ${name}`)]));
  const least = make("input", { type: "number", step: "any", placeholder: "least score", "data-choice": "least", "aria-label": "least score", style: "width:9em", oninput: refresh });
  const size = make("input", { type: "range", min: 64, max: 320, step: 16, value: 144, "aria-label": "size", oninput: layout });
  const count = make("output", { class: "dim", "data-count": "" });
  const place = make("div", { class: "gallery" });
  let found = [], columns = 1, cell = 144, live = new Map();

  function refresh() {
    const by = order.value.slice(1), sign = order.value.startsWith("-") ? -1 : 1;
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const judge = by || scores[0];
    found = folder.pictures.filter((one) => wanted.every((word) => one.prompt.toLowerCase().includes(word))
      && (!seeds.value || String(one.seed) === seeds.value) && (!adapters.value || one.adapter === adapters.value)
      && axes.every((axis, i) => !places[i].value || one.at[axis] === places[i].value)
      && (least.value === "" || !judge || (one.scores[judge] ?? -Infinity) >= +least.value));
    if (by) found = [...found].sort((a, b) => sign * ((a.scores[by] ?? sign * Infinity) - (b.scores[by] ?? sign * Infinity)) || 0);
    count.textContent = `${found.length} of ${folder.pictures.length} pictures`;
    layout();
  }

  function layout() {
    cell = +size.value;
    columns = Math.max(1, Math.floor((place.clientWidth || 800) / cell));
    place.style.height = `${Math.ceil(found.length / columns) * (cell + 36)}px`;
    for (const one of live.values()) one.remove();
    live = new Map();
    look();
  }

  function look() {
    const box = place.getBoundingClientRect(), high = cell + 36;
    const first = Math.max(0, Math.floor(-box.top / high) - 2) * columns;
    const last = Math.min(found.length, (Math.ceil((innerHeight - box.top) / high) + 2) * columns);
    for (const [i, one] of live) if (i < first || i >= last) { one.remove(); live.delete(i); }
    for (let i = first; i < last; i++) if (!live.has(i)) { const one = shown(i, high); live.set(i, one); place.append(one); }
  }

  function shown(i, high) {
    const one = found[i], by = order.value.slice(1) || scores[0];
    const score = by && by in one.scores ? `${by} ${short(one.scores[by])}` : "";
    return make("button", {
      class: "cell", "data-file": one.file, title: one.prompt, onclick: () => open(i),
      style: `left:${(i % columns) * cell}px;top:${Math.floor(i / columns) * high}px;width:${cell}px;height:${high}px`,
    }, make("img", { src: one.src, alt: one.prompt, style: `height:${cell - 8}px` }), make("span", {}, one.prompt), make("span", { class: "dim" }, `seed ${one.seed} ${score}`));
  }

  function open(i) {
    const one = found[i];
    const lines = [one.prompt, `seed ${one.seed}, adapter ${one.adapter}, ${one.file}`, ...Object.entries(one.at).map(([axis, word]) => `${axis} ${word}`), ...Object.entries(one.scores).map(([name, value]) => `${name} ${short(value)}`)];
    zoom({ src: `${folder.base}/${encodeURIComponent(one.file)}`, small: one.src, lines, command: one.command, go: (by) => found[i + by] && open(i + by) });
  }

  addEventListener("scroll", look, { passive: true });
  addEventListener("resize", layout);
  requestAnimationFrame(refresh);
  const lost = folder.missing ? make("div", { class: "alarms" }, `${folder.missing} pictures of the manifest are not there`) : null;
  return make("section", { "data-folder": folder.name }, make("h2", {}, folder.name), make("div", { class: "dim" }, folder.folder), lost,
    make("div", { class: "bar" }, words, seeds, adapters, ...places, order, scores.length ? least : null, make("label", {}, "size ", size), count), place);
}

// ---------------------------------------------------------------------------------------------------- zoom

const dialog = document.getElementById("zoom");
let moved = null;

/** A picture by itself; `small` is shown where `src` cannot be read. */
function zoom({ src, small, lines, command, go }) {
  const picture = make("img", { src, alt: lines[0] });
  if (small) picture.addEventListener("error", () => { picture.src = small; }, { once: true });
  const copy = command ? make("details", { open: "" }, make("summary", {}, "draw it again"), make("pre", {}, command),
    make("button", { onclick: () => navigator.clipboard && navigator.clipboard.writeText(command) }, "copy")) : null;
  moved = go || null;
  dialog.replaceChildren(...[picture, ...lines.map((line) => make("div", {}, line)), copy, make("button", { onclick: () => dialog.close() }, "close")].filter(Boolean));
  if (!dialog.open) dialog.showModal();
}

dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (dialog.open) { if (moved) moved(by); return; }
  const slider = document.getElementById("step");
  if (slider) { slider.value = +slider.value + by; slider.dispatchEvent(new Event("input")); }
});

// ---------------------------------------------------------------------------------------------------- the page

document.getElementById("head").append(make("h1", {}, document.title));
const sections = data.runs.length ? [previews(data.runs), curves(data.runs), ...data.runs.map(facts)] : [];
document.getElementById("main").append(...sections.filter(Boolean), ...data.samples.map(gallery));

// The live page: parts and events that arrive as server-sent events are put into the document. Text is only ever set as text, so
// nothing that a run wrote becomes markup. What did not change is not touched: selection, focus and scroll positions stay.
"use strict";

const LAST_EVENTS = 200;
const TABLE_ROWS = 12;
const ANNOUNCE_MS = 15000;
const NONE = "–";
const ACTIVITIES = { all: "all", training: "training", answered: "answered", idle: "idle", offline: "offline", refused: "refused" };
const CLIENT_HEADS = [
  "Client", "Activity", "Device", "Task", "Rank", "Depth", "Since", "Merged", "Refused", "Loss", "Staleness",
];
const MINOR = new Set([2, 3, 5, 6, 9, 10]);

const parts = {};
const changed = new Set();
let events = [];
let filter = "all";
let paused = false;
let scheduled = false;
let announced = { at: 0, text: "" };

const find = (id) => document.getElementById(id);

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Numbers -------------------------------------------------------------------------------------------------------------

function short(value) {
  const large = Math.abs(value);
  const digits = large >= 100 || Number.isInteger(value) ? 0 : large >= 10 ? 1 : large >= 1 ? 2 : 3;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function byteUnit(value) {
  return [[1e9, " GB"], [1e6, " MB"], [1e3, " kB"]].find(([size]) => Math.abs(value) >= size) ?? [1, " B"];
}

function bytes(value) {
  const [size, unit] = byteUnit(value);
  return short(value / size) + unit;
}

const FORMATS = { percent: (value) => `${(100 * value).toFixed(1)} %`, number: short, bytes };

// Names of the places on an axis, all with as many digits as their step needs.
function tickNames(values, unit) {
  const top = Math.max(...values.map(Math.abs));
  const [size, suffix] = unit === "percent" ? [0.01, " %"] : unit === "bytes" ? byteUnit(top) : [1, ""];
  const step = values.length > 1 ? (values[1] - values[0]) / size : 1;
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return values.map((value) => `${(value / size).toLocaleString("en", options)}${suffix}`);
}

// Even steps of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`.
function ticks(low, high, count, whole) {
  const rough = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const factor = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const step = whole ? Math.max(1, factor * power) : factor * power;
  const found = [];
  for (let k = Math.floor(low / step + 1e-9); ; k++) {
    found.push(k * step);
    if (k * step >= high - step * 1e-9 || found.length > 50) return found;
  }
}

// Charts --------------------------------------------------------------------------------------------------------------

function lineScale(chart, width, height) {
  const points = chart.lines.flatMap((line) => line.points);
  const levels = chart.baselines.map((level) => level.value);
  const values = [...points.map((point) => point[1]), ...levels];
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.unit !== "number" || low < (high - low) / 2) low = Math.min(0, low);
  const rows = ticks(low, high, 4, false);
  [low, high] = [rows[0], rows.at(-1)];
  const first = Math.min(...points.map((point) => point[0])), last = Math.max(...points.map((point) => point[0]));
  const steps = ticks(first, last, Math.max(2, Math.floor(width / 110)), true);
  const columns = first < last ? steps.filter((at) => at >= first && at <= last) : [first];
  const left = 12 + 7 * Math.max(...tickNames(rows, chart.unit).map((name) => name.length));
  const right = width - 14, top = 10, bottom = height - 36;
  return {
    rows, columns, left, right, top, bottom,
    x: (at) => left + (last > first ? (at - first) / (last - first) : 0.5) * (right - left),
    y: (value) => bottom - (high > low ? (value - low) / (high - low) : 0.5) * (bottom - top),
  };
}

function axes(chart, scale, names, middle) {
  const group = draw("g", { class: "axis" });
  const marks = tickNames(scale.rows, chart.unit);
  for (const [k, row] of scale.rows.entries()) {
    const y = scale.y(row);
    group.append(
      draw("line", { x1: scale.left, x2: scale.right, y1: y, y2: y }),
      draw("text", { x: scale.left - 7, y: y + 4, "text-anchor": "end" }, marks[k]),
    );
  }
  for (const [x, name] of names) group.append(draw("text", { x, y: scale.bottom + 17, "text-anchor": "middle" }, name));
  group.append(draw("text", { x: middle, y: scale.bottom + 34, "text-anchor": "middle" }, chart.x));
  return group;
}

function drawLines(svg, chart, width, height) {
  const scale = lineScale(chart, width, height);
  const names = scale.columns.map((at) => [scale.x(at), short(at)]);
  svg.append(axes(chart, scale, names, (scale.left + scale.right) / 2));
  chart.baselines.forEach((level, k) => {
    const y = scale.y(level.value);
    svg.append(draw("line", { class: `level level-${k}`, x1: scale.left, x2: scale.right, y1: y, y2: y }));
  });
  chart.lines.forEach((line, k) => {
    const path = line.points.map(([x, y], i) => `${i ? "L" : "M"}${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`).join("");
    const [x, y] = line.points.at(-1);
    svg.append(
      draw("path", { class: `curve series-${k}`, d: path }),
      draw("circle", { class: `dot series-${k}`, cx: scale.x(x), cy: scale.y(y), r: 3.5 }),
    );
  });
}

function drawBars(svg, chart, width, height) {
  const high = ticks(0, Math.max(...chart.bars.map((bar) => bar[1])), 4, false);
  const left = 12 + 7 * Math.max(...tickNames(high, chart.unit).map((name) => name.length));
  const right = width - 8, top = 10, bottom = height - 36, step = (right - left) / chart.bars.length;
  const y = (value) => bottom - (value / high.at(-1)) * (bottom - top);
  const every = Math.ceil((8 + 7 * Math.max(...chart.bars.map((bar) => bar[0].length))) / step);
  const names = chart.bars.map((bar, k) => [left + (k + 0.5) * step, bar[0]]).filter((_, k) => k % every === 0);
  svg.append(axes(chart, { rows: high, left, right, bottom, y }, names, (left + right) / 2));
  chart.bars.forEach(([, share], k) => {
    const box = { x: left + (k + 0.12) * step, width: 0.76 * step, y: y(share), height: bottom - y(share) };
    svg.append(draw("rect", { class: "bar", ...box }));
  });
}

function legend(chart) {
  const items = [
    ...chart.lines.map((line, k) => [`curve series-${k}`, `${line.name} ${line.text}`]),
    ...chart.baselines.map((level, k) => [`level level-${k}`, `${level.name} ${level.text}`]),
  ];
  const mark = (kind) => draw("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, draw("line", { class: kind, x1: 0, x2: 22, y1: 4, y2: 4 }));
  return make("ul", { class: "legend" }, ...items.map(([kind, text]) => make("li", {}, mark(kind), text)));
}

function evenly(rows, most) {
  const last = Math.max(1, Math.min(most, rows.length) - 1);
  return Array.from({ length: Math.min(most, rows.length) }, (_, k) => rows[Math.floor((k * (rows.length - 1)) / last)]);
}

function chartTable(chart) {
  const format = FORMATS[chart.unit];
  if (chart.bars) return [[chart.x, "share"], chart.bars.map(([name, share]) => [name, format(share)])];
  const values = chart.lines.map((line) => new Map(line.points));
  const places = [...new Set(chart.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const rows = evenly(places, TABLE_ROWS).map((at) => [
    short(at), ...values.map((of) => (of.has(at) ? format(of.get(at)) : NONE)), ...chart.baselines.map((level) => level.text),
  ]);
  return [[chart.x, ...chart.lines.map((line) => line.name), ...chart.baselines.map((level) => level.name)], rows];
}

function summary(chart) {
  const format = FORMATS[chart.unit];
  if (chart.bars) return `${chart.title}: ${chart.bars.map(([name, share]) => `${name}: ${format(share)}`).join(", ")}`;
  const lines = chart.lines.map((line) => {
    const [first, last] = [line.points[0], line.points.at(-1)];
    return `${line.name} ${format(first[1])} at ${chart.x} ${short(first[0])}, ${line.text} at ${short(last[0])}`;
  });
  return [`${chart.title}`, ...lines, ...chart.baselines.map((level) => `${level.name} ${level.text}`)].join("; ");
}

function showCharts() {
  const place = find("charts"), charts = parts.charts?.charts ?? [];
  while (place.children.length > charts.length) place.lastElementChild.remove();
  while (place.children.length < charts.length) {
    const table = make("details", {}, make("summary", {}, "Table"), make("div", { class: "wide" }, make("table", { class: "numbers" })));
    table.addEventListener("toggle", () => refresh("charts"));
    place.append(make("figure", {}, make("figcaption"), draw("svg", { role: "img" }), make("div"), table));
  }
  charts.forEach((chart, k) => {
    const [caption, svg, under, table] = place.children[k].children;
    const width = svg.clientWidth || 360, height = svg.clientHeight || 216;
    setText(caption, chart.title);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", summary(chart));
    (chart.bars ? drawBars : drawLines)(svg, chart, width, height);
    under.replaceChildren(legend(chart));
    if (table.open) fillTable(table.querySelector("table"), ...chartTable(chart));
  });
}

// Tables and lists ----------------------------------------------------------------------------------------------------

function fillTable(table, head, rows, classOf = () => "", cellOf = null) {
  if (!table.tHead) table.append(make("thead", {}, make("tr")), make("tbody"));
  fillRow(table.tHead.rows[0], head, "th", classOf);
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  while (body.rows.length < rows.length) body.append(make("tr"));
  rows.forEach((row, k) => fillRow(body.rows[k], row, "td", classOf, cellOf));
}

function fillRow(row, texts, kind, classOf, cellOf = null) {
  while (row.cells.length > texts.length) row.lastElementChild.remove();
  while (row.cells.length < texts.length) {
    const name = classOf(row.cells.length);
    row.append(make(kind, { ...(kind === "th" ? { scope: "col" } : {}), ...(name ? { class: name } : {}) }));
  }
  texts.forEach((text, k) => {
    const special = cellOf?.(k, text, row.cells[k]);
    if (!special) setText(row.cells[k], text);
  });
}

function activityCell(column, text, cell) {
  if (column !== 1) return false;
  const mark = cell.firstElementChild ?? cell.appendChild(make("span"));
  mark.className = `activity ${text}`;
  setText(mark, text);
  return true;
}

function showClients() {
  const { counts = {}, rows = [], hidden = 0 } = parts.clients ?? {};
  const wanted = find("search").value.trim().toLowerCase();
  const fits = (row) => filter === "all" || row[1] === filter || (filter === "refused" && row[8] !== "0");
  const shown = rows.filter((row) => fits(row) && row[0].toLowerCase().includes(wanted));
  fillTable(find("clients"), CLIENT_HEADS, shown, (column) => (MINOR.has(column) ? "minor" : ""), activityCell);
  const all = Object.values(counts).reduce((sum, count) => sum + count, 0);
  for (const button of find("filters").children) {
    const name = button.dataset.activity;
    const count = name === "all" ? all : name === "refused" ? rows.filter((row) => row[8] !== "0").length : (counts[name] ?? 0);
    setText(button, `${ACTIVITIES[name]} ${count.toLocaleString("en")}`);
    button.setAttribute("aria-pressed", String(name === filter));
  }
  const left = hidden ? `${hidden.toLocaleString("en")} more clients are not listed; those that train come first.` : "";
  setText(find("hidden"), shown.length || !rows.length ? left : "No client in this list fits.");
}

function showRows(name, head) {
  const rows = parts[name]?.rows ?? [];
  find(`${name}-section`).hidden = !rows.length;
  fillTable(find(name), head, rows);
}

function showSamples() {
  const rows = parts.samples?.rows ?? [];
  find("samples-section").hidden = !rows.length;
  const names = ["Request", "Reference answer", "Before training", "After training"];
  const lists = rows.map((texts) =>
    make("dl", { class: "sample" }, ...texts.flatMap((text, k) => [make("dt", {}, names[k]), make("dd", {}, text || "(nothing)")])));
  find("samples").replaceChildren(...lists);
}

function showEvents() {
  if (paused) return;
  const place = find("events"), there = new Set(events.map((event) => String(event[0])));
  for (const item of [...place.children]) if (!there.has(item.dataset.number)) item.remove();
  const newest = Number(place.firstElementChild?.dataset.number ?? 0);
  for (const [number, time, kind, text] of events) {
    if (number <= newest) continue;
    const item = make("li", { "data-number": number, "data-kind": kind }, ...[time, kind, text].map((one) => make("span", {}, one)));
    place.prepend(item);
  }
}

// The head ------------------------------------------------------------------------------------------------------------

function showHead() {
  const run = parts.run;
  if (!run) return;
  for (const name of ["name", "about", "sentence", "folder"]) setText(find(name), run[name]);
  find("status").className = `status ${run.status}`;
  setText(find("status"), run.status);
  find("progress").value = run.progress ?? 0;
  const left = run.left ? `about ${run.left} left` : "";
  setText(find("progress-text"), [run.progress_text, run.elapsed, left].filter(Boolean).join(" · "));
  const reading = run.reading === null ? "" : `Reading the logs: ${Math.round(100 * run.reading)} %.`;
  const waits = [run.waits, reading].filter(Boolean).join(" ");
  find("waits").hidden = !waits;
  setText(find("waits"), waits);
  const notes = [...(parts.problems?.rows ?? []), ...run.notes];
  find("notes-section").hidden = !notes.length;
  find("notes").replaceChildren(...notes.map((note) => make("p", { class: "note" }, note)));
  const ended = { interrupted: "was interrupted", killed: "was ended from outside", failed: "failed" }[run.status];
  showAlert(ended ? `The run ${ended}${run.reason ? `: ${run.reason}` : ""}.` : "");
  const score = parts.figures?.tiles[0]?.[1] ?? "";
  document.title = [score === NONE ? "" : score, run.progress_text, run.name].filter(Boolean).join(" · ");
  announce(run.status, score);
}

function showAlert(text) {
  find("alert").hidden = !text;
  setText(find("alert"), text);
}

// Say politely what is new, and not too often.
function announce(status, score) {
  const text = `${status}, ${parts.run.progress_text}${score && score !== NONE ? `, ${parts.figures.tiles[0][0]} ${score}` : ""}`;
  const now = performance.now();
  if (text === announced.text || (now < announced.at + ANNOUNCE_MS && status === "running")) return;
  announced = { at: now, text };
  setText(find("announcement"), text);
}

function showTiles() {
  const place = find("tiles"), tiles = parts.figures?.tiles ?? [];
  while (place.children.length > tiles.length) place.lastElementChild.remove();
  while (place.children.length < tiles.length) place.append(make("div", {}, make("dt"), make("dd"), make("dd", { class: "beside" })));
  tiles.forEach((texts, k) => texts.forEach((text, i) => setText(place.children[k].children[i], text)));
}

// What arrives --------------------------------------------------------------------------------------------------------

const SHOW = {
  run: showHead,
  problems: showHead,
  figures: () => { showTiles(); showHead(); },
  charts: showCharts,
  clients: showClients,
  refusals: () => showRows("refusals", ["Time", "Client", "What", "Reason"]),
  plan: () => showRows("plan", ["Client", "Rank", "Depth", "Rounds", "Steps", "Reason"]),
  samples: showSamples,
  events: showEvents,
};

function refresh(...names) {
  names.forEach((name) => changed.add(name));
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    const now = [...changed];
    changed.clear();
    for (const show of new Set(now.map((name) => SHOW[name]))) show?.();
  });
}

function take(message) {
  if (message.full) {
    events = [];
    for (const name of Object.keys(parts)) delete parts[name];
    find("events").replaceChildren();
  }
  Object.assign(parts, message.parts);
  const known = events.at(-1)?.[0] ?? 0;
  events = [...events, ...message.events.filter((event) => event[0] > known)].slice(-LAST_EVENTS);
  refresh(...(message.full ? Object.keys(SHOW) : Object.keys(message.parts)), ...(message.events.length ? ["events"] : []));
}

function setLink(kind, text) {
  find("link").className = `link ${kind}`;
  setText(find("link"), text);
}

function connect() {
  const source = new EventSource("events");
  source.onopen = () => setLink("open", "connected");
  source.onerror = () => setLink("lost", source.readyState === EventSource.CLOSED ? "disconnected" : "reconnecting");
  source.onmessage = (event) => take(JSON.parse(event.data));
  source.addEventListener("over", () => {
    source.close();
    setLink("", "no longer updated");
    setText(find("announcement"), "This page is no longer updated.");
  });
}

function prepare() {
  for (const name of Object.keys(ACTIVITIES)) {
    const button = make("button", { type: "button", "data-activity": name, "aria-pressed": String(name === filter) }, ACTIVITIES[name]);
    button.addEventListener("click", () => { filter = name; refresh("clients"); });
    find("filters").append(button);
  }
  find("search").addEventListener("input", () => refresh("clients"));
  find("pause").addEventListener("click", (event) => {
    paused = !paused;
    event.target.setAttribute("aria-pressed", String(paused));
    setText(event.target, paused ? "Continue" : "Pause");
    refresh("events");
  });
  new ResizeObserver(() => refresh("charts")).observe(find("charts"));
  connect();
}

prepare();

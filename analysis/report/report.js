"use strict";
// The report's page: everything it shows comes from the JSON in #data and is put in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element with properties, listeners (onclick, ...) and children; strings become text. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---------------------------------------------------------------- tables

/** The number a cell starts with, for sorting; null for a dash or text. */
function number(text) {
  const found = text.replaceAll("−", "-").match(/^<?\s*([-+]?\d[\d.]*(?:e[-+]?\d+)?)/i);
  return found ? parseFloat(found[1]) : null;
}

/** Order of two cells; what is missing comes last, whichever way is up. */
function compare(a, b, numeric, up) {
  if (!numeric) return up * a.localeCompare(b, "en", { numeric: true });
  const [x, y] = [number(a), number(b)];
  if (x === null || y === null) return (x === null) - (y === null);
  return up * (x - y);
}

/**
 * A grid {head, left, rows: [{cells: [[text, mark]], runs, rule}]} as a table that sorts and, if long, filters.
 * Cells of rows with runs open their record; with `link`, those of that column alone.
 */
function grid(found, title, tall = false) {
  const body = el("tbody");
  const lines = found.rows.map((row) => {
    const line = el("tr", { className: row.rule ? "rule" : "" });
    row.cells.forEach(([text, mark], column) => {
      const opens = row.runs.length && text !== "–" && (found.link ?? column) === column;
      const named = found.link === undefined ? [found.head[column], text, found] : [];
      const shown = opens ? el("button", { type: "button", onclick: () => showRuns(row.runs, ...named) }, text) : text;
      line.append(el("td", { className: `${column < found.left ? "left" : ""} ${mark}`.trim() }, shown));
    });
    body.append(line);
    return { line, texts: row.cells.map(([text]) => text) };
  });
  const heads = found.head.map((name, column) => {
    const head = el("th", { className: column < found.left ? "left" : "", scope: "col" });
    head.append(el("button", { type: "button", onclick: () => sort(column) }, name));
    return head;
  });
  function sort(column) {
    const up = heads[column].ariaSort === "ascending" ? -1 : 1;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    lines.sort((a, b) => compare(a.texts[column], b.texts[column], column >= found.left, up));
    lines.forEach(({ line }) => line.classList.remove("rule"));
    body.append(...lines.map(({ line }) => line));
  }
  const count = el("span", { className: "soft" });
  const filter = el("input", { type: "search", className: "filter", placeholder: "filter rows", ariaLabel: `filter ${title}` });
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const { line, texts } of lines) {
      const text = texts.join(" ").toLowerCase();
      line.hidden = !words.every((word) => text.includes(word));
      left += !line.hidden;
    }
    count.textContent = words.length ? `${left} of ${lines.length}` : "";
  });
  return el("div", {},
    lines.length > 8 ? el("div", { className: "controls" }, filter, count) : null,
    el("div", { className: tall ? "scroll tall" : "scroll" },
      el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body)));
}

// ---------------------------------------------------------------- a number's record

const COSTS = {
  "keep %": ["mean_keep", "visual_tokens_per_layer"],
  "tokens": ["visual_tokens", "visual_tokens_per_layer", "tokens_per_layer"],
  "FLOPs %": ["prefill_flops_ratio", "prefill_flops", "paper_macs_visual", "flops_parts"],
  "KV %": ["kv_ratio", "kv_bytes"],
  "time %": ["prefill_time_ratio", "prefill_ms", "baseline_prefill_ms"],
};

function definitions(pairs) {
  return el("dl", {}, ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

/** One value of a record in a line: numbers to six digits, lists and objects in full. */
function plain(value) {
  if (typeof value === "number") return String(+value.toPrecision(6));
  if (Array.isArray(value)) return value.map(plain).join(", ");
  if (value && typeof value === "object") return Object.entries(value).map(([k, v]) => `${k} ${plain(v)}`).join("; ");
  return String(value);
}

/** Open the dialog: where the number under `column` comes from. */
function showRuns(ids, column = "", text = "", found = {}) {
  const box = byId("record");
  const task = (found.tasks ?? {})[column];
  box.replaceChildren(
    el("button", { type: "button", className: "plain close", onclick: () => box.close() }, "Close"),
    el("h2", {}, column ? `${column}: ${text}` : data.runs[ids[0]].label));
  if (ids.length > 1) box.append(el("p", { className: "soft" }, `${ids.length} runs that differ in the seed alone`));
  for (const id of ids) box.append(describe(data.runs[id], column, task));
  if (!box.open) box.showModal();
}

function describe(run, column, task) {
  const { spec, environment, cost } = run.record;
  const versions = { ...environment.packages, ...JSON.parse(spec.versions || "{}") };
  const dirty = environment.git_dirty ? " + uncommitted changes" : "";
  const machine = [environment.device_name, environment.processor, environment.cores && `${environment.cores} cores`,
    environment.threads && `${environment.threads} threads`, `device ${spec.device}`];
  const samples = data.samples.answers[run.id];
  const box = el("div", {},
    el("h3", {}, `${run.folder} (${run.record.status})`),
    definitions([
      ["method", `${spec.method} ${spec.method_args}, ${spec.schedule || "nothing dropped"}, ${spec.positions} positions`],
      ["command", el("code", {}, `python ${run.record.command.join(" ")}`)],
      ["commit", `${environment.git_commit ?? "not recorded"}${dirty}; sources ${spec.code || "unknown"}`],
      ["versions", Object.entries(versions).sort().map((pair) => pair.join(" ")).join(", ")],
      ["hardware", machine.filter(Boolean).join(", ")],
      ["seed", String(spec.seed)],
      ["settings", `${spec.model} (${spec.model_fingerprint.slice(0, 12)}), ${spec.dtype}, ${spec.attn_implementation}, `
        + `batch ${spec.batch_size}, prompt ${spec.prompt}, image ${spec.image_mode}, `
        + (spec.limit === null ? "all samples" : `first ${spec.limit} samples of each task`)],
      ["made", `${run.record.started_at}, ${Math.round(run.record.wall_s)} s`],
    ]));
  if (run.record.error) box.append(el("div", { className: "warning" }, run.record.error));
  if (cost && COSTS[column]) {
    const there = COSTS[column].filter((name) => cost[name] !== null && cost[name] !== undefined);
    box.append(el("h3", {}, "Raw values"), definitions(there.map((name) => [name, plain(cost[name])])));
  } else {
    const shown = Object.entries(run.record.results).filter(([name]) => !task || name === task);
    const rows = shown.flatMap(([name, result]) => Object.entries(result.scores).map(([metric, score]) => ({
      runs: [], cells: [[name, ""], [metric, metric === result.main_metric ? "best" : ""], [plain(score.value), ""],
        [`${score.n} of ${result.n_total}`, ""], [result.data_hash, ""]] })));
    if (rows.length) box.append(el("h3", {}, "Raw values"),
      grid({ head: ["task", "metric", "value", "samples", "data"], left: 2, rows }, "raw values"));
  }
  if (samples) box.append(el("p", {}, el("button", { type: "button", className: "plain", onclick: () => {
    byId("record").close();
    browse(run.id, task);
  } }, "its samples")));
  box.append(el("details", {}, el("summary", {}, "the whole record"),
    el("pre", {}, JSON.stringify(run.record, null, 1))));
  return box;
}

// ---------------------------------------------------------------- sections

function summary() {
  const tiles = data.summary.map(([value, name]) => el("div", { className: "tile" }, el("b", {}, value), el("span", {}, name)));
  const rows = data.experiments.map((one) => ({ runs: [], cells: one.line.map((text) => [text, ""]) }));
  byId("summary-body").append(
    el("div", { className: "tiles" }, ...tiles),
    ...data.warnings.map((text) => el("div", { className: "warning" }, text)),
    grid({ head: data.line_head, left: 1, rows }, "experiments"));
}

let current = null; // the chosen experiment

function choose(name) {
  current = data.experiments.find((one) => one.name === name) ?? data.experiments[0];
  if (!current) return;
  byId("experiment").value = current.name;
  const tables = byId("tables-body");
  tables.replaceChildren(...current.refused.map((text) => el("div", { className: "warning" }, text)));
  for (const table of current.tables) {
    if (current.tables.length > 1) tables.append(el("h3", {}, table.title));
    tables.append(...table.warnings.map((text) => el("div", { className: "warning" }, text)));
    for (const one of table.grids) tables.append(el("h3", {}, one.title), grid(one, one.title));
  }
  if (current.tables.length) tables.append(el("details", {}, el("summary", {}, "What the columns mean"),
    ...current.meaning.map((line) => el("p", { className: "soft" }, line))));
  byId("figures-body").replaceChildren(current.figures.length
    ? el("div", { className: "figures" }, ...current.figures.map((one) =>
      el("figure", { className: one.wide ? "wide" : "" },
        el("img", { src: one.source, alt: one.caption, loading: "lazy", decoding: "async" }),
        el("figcaption", {}, one.caption))))
    : el("p", { className: "soft" }, `No figure of ${current.name} has been drawn yet: python -m analysis figures ${current.name}`));
  samples();
}

// ---------------------------------------------------------------- samples

const browser = { task: null, doc: null, runs: new Set(), stage: Infinity, text: "", apart: false };

/** Which runs of the experiment have samples here. */
const sampled = () => current.runs.filter((id) => data.samples.answers[id]);

function browse(id, task) {
  const home = data.experiments.find((one) => one.runs.includes(id));
  if (home && !current.runs.includes(id)) choose(home.name);
  browser.runs.add(id);
  if (task) browser.task = task;
  samples(true);
  byId("samples").scrollIntoView();
}

function samples(keep = false) {
  const box = byId("samples-body"), ids = sampled();
  if (!ids.length) {
    box.replaceChildren(el("p", { className: "soft" }, "No finished run of this experiment has samples here."));
    return;
  }
  if (!keep) { // the first run of each method, the mildest budget
    const seen = new Set();
    browser.runs = new Set(ids.filter((id) => {
      const method = data.runs[id].record.spec.method;
      return !seen.has(method) && seen.add(method);
    }).slice(0, 4));
  }
  const tasks = [...new Set(ids.flatMap((id) => Object.keys(data.samples.answers[id])))];
  if (!tasks.includes(browser.task)) browser.task = tasks[0];
  const list = el("div", { className: "list" }), view = el("div"), chips = el("div", { className: "chips" });
  const select = el("select", { ariaLabel: "task", onchange: () => { browser.task = select.value; fill(); } },
    ...tasks.map((task) => el("option", { value: task, selected: task === browser.task }, task)));
  const search = el("input", { type: "search", placeholder: "search questions and answers", value: browser.text,
    oninput: () => { browser.text = search.value; fill(); } });
  const apart = el("input", { type: "checkbox", checked: browser.apart,
    onchange: () => { browser.apart = apart.checked; fill(); } });
  for (const id of ids) {
    const tick = el("input", { type: "checkbox", checked: browser.runs.has(id), onchange: () => {
      browser.runs[tick.checked ? "add" : "delete"](id);
      fill();
    } });
    chips.append(el("label", {}, tick, ` ${data.runs[id].label}`));
  }
  function fill() {
    const answers = ids.filter((id) => browser.runs.has(id)).map((id) => data.samples.answers[id][browser.task] ?? {});
    const wanted = browser.text.toLowerCase();
    const docs = [...new Set(answers.flatMap((held) => Object.keys(held)))].map(Number).sort((a, b) => a - b)
      .filter((number) => {
        const given = answers.map((held) => held[number]).filter(Boolean).map((entry) => entry[0]);
        const doc = data.samples.docs[number];
        const text = [doc.question, doc.target, ...given].join(" ").toLowerCase();
        return (!wanted || text.includes(wanted)) && (!browser.apart || new Set(given).size > 1);
      });
    if (!docs.includes(browser.doc)) browser.doc = docs[0] ?? null;
    list.replaceChildren(...docs.slice(0, 300).map((number) => el("button", {
      type: "button", ariaCurrent: String(number === browser.doc),
      onclick: () => { browser.doc = number; fill(); },
    }, `${data.samples.docs[number].id}: ${data.samples.docs[number].question.slice(0, 90)}`)));
    view.replaceChildren(browser.doc === null ? el("p", { className: "soft" }, "No sample fits.") : one(browser.doc, ids));
  }
  box.replaceChildren(
    el("p", { className: "soft" }, data.samples.note),
    el("div", { className: "controls" }, select, search, el("label", {}, apart, " only where answers differ")),
    el("details", { open: browser.runs.size === 0 }, el("summary", {}, `Runs side by side (${ids.length})`), chips),
    el("div", { className: "browser" }, list, view));
  fill();
}

/** One sample: question, and one card per run, whose overlays follow one slider. */
function one(number, ids) {
  const doc = data.samples.docs[number];
  const shown = ids.filter((id) => browser.runs.has(id) && data.samples.answers[id][browser.task]?.[number]);
  const stages = Math.max(0, ...shown.map((id) => data.runs[id].layers.length));
  const cards = shown.map((id) => card(id, doc, data.samples.answers[id][browser.task][number]));
  const label = el("output");
  const slider = el("input", { type: "range", min: 0, max: stages, value: Math.min(browser.stage, stages), ariaLabel: "stage" });
  const draw = () => {
    const stage = Number(slider.value);
    label.textContent = stage ? `stage ${stage + 1}: after boundary ${stage} of ${stages}` : "stage 1: all visual tokens";
    cards.forEach((entry) => entry.draw(stage));
  };
  slider.addEventListener("input", () => { browser.stage = Number(slider.value); draw(); }); // until then the last one
  draw();
  return el("div", {},
    el("p", { className: "question" }, doc.question),
    el("p", { className: "soft" }, `right: ${doc.target}  ·  ${browser.task} ${doc.id}  ·  ${doc.tokens} visual tokens`),
    stages ? el("div", { className: "slider" }, slider, label) : null,
    el("div", { className: "cards" }, ...cards.map((entry) => entry.box)));
}

function card(id, doc, [answer, score, kept, maps]) {
  const run = data.runs[id], canvas = el("canvas"), note = el("div", { className: "soft" });
  const verdict = score === 1 ? ["right", "right"] : score === 0 ? ["wrong", "wrong"] : ["", score === null ? "" : `score ${+score.toPrecision(3)}`];
  const sources = doc.images.map((name) => data.samples.images[name]);
  const pictures = sources.map((source) => source && Object.assign(new Image(), { src: source }));
  const missing = !sources.length || !sources.every(Boolean) ? "the image is not at hand: python -m analysis report --images PATH"
    : !doc.layout ? "the record does not say where the visual tokens lie" : "";
  function draw(stage) {
    const at = Math.min(stage, run.layers.length);
    const mask = at && kept.length ? kept[at - 1] : null;
    const map = maps && maps.length ? maps[Math.min(stage, maps.length - 1)] : null;
    note.textContent = missing || (map ? `attention at layer ${run.study[Math.min(stage, maps.length - 1)]}`
      : at ? `from layer ${run.layers[at - 1]}: ${count(mask)} of ${doc.tokens} kept` : `all ${doc.tokens}`);
    if (!missing) Promise.all(pictures.map((picture) => picture.decode())).then(() => paint(canvas, pictures, doc, mask, map)).catch(() => {
      note.textContent = "the image cannot be decoded";
    });
  }
  const box = el("div", { className: "card" },
    el("b", {}, el("button", { type: "button", className: "plain", onclick: () => showRuns([id]) }, run.label)),
    missing ? null : canvas, note,
    el("div", {}, `${answer} `, el("span", { className: verdict[0] }, verdict[1] ? `(${verdict[1]})` : "")));
  return { box, draw };
}

/** Whether token j's bit is set in a hexadecimal mask, token 0 the lowest bit of the last digit. */
function has(mask, j) {
  const at = mask.length - 1 - (j >> 2);
  return at >= 0 && (parseInt(mask[at], 16) >> (j & 3) & 1) === 1;
}

const count = (mask) => [...mask].reduce((sum, digit) => sum + [0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4][parseInt(digit, 16)], 0);

const HEAT = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

function heat(strength) {
  const place = strength * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2), part = place - low;
  return `rgb(${HEAT[low].map((value, n) => Math.round(value + part * (HEAT[low + 1][n] - value))).join(" ")} / .72)`;
}

/** The views of a prompt (see analysis/pictures.py): dropped tokens greyed, or a heat map. */
function paint(canvas, pictures, doc, mask, map) {
  const weights = map ? Uint8Array.from(atob(map), (letter) => letter.charCodeAt(0)) : null;
  const of = doc.layout.flatMap((views, number) => views.map(() => pictures[number]));
  const blocks = doc.layout.flat(), across = Math.ceil(Math.sqrt(blocks.length)), gap = 4;
  const side = Math.floor((220 - gap * (across - 1)) / across);
  const scale = (block) => Math.max(1, Math.floor(side / Math.max(block[0], block[1])));
  const cell = { w: Math.max(...blocks.map((b) => b[1] * scale(b))), h: Math.max(...blocks.map((b) => b[0] * scale(b))) };
  const ratio = window.devicePixelRatio || 1, down = Math.ceil(blocks.length / across);
  const size = { w: across * (cell.w + gap) - gap, h: down * (cell.h + gap) - gap };
  canvas.width = size.w * ratio; canvas.height = size.h * ratio;
  canvas.style.width = `${size.w}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  let token = 0;
  blocks.forEach(([rows, columns, newline, left, top, right, bottom], n) => {
    const unit = scale(blocks[n]), w = columns * unit, h = rows * unit;
    const x = (n % across) * (cell.w + gap), y = Math.floor(n / across) * (cell.h + gap);
    pen.save();
    pen.beginPath(); pen.rect(x, y, w, h); pen.clip();
    pen.fillStyle = "rgb(122 116 104)"; pen.fillRect(x, y, w, h);
    if (map) pen.filter = "grayscale(1)";
    pen.drawImage(of[n], x - left / (right - left) * w, y - top / (bottom - top) * h, w / (right - left), h / (bottom - top));
    pen.filter = "none";
    const first = token, wide = columns + newline;
    const stays = (row, column) => row >= 0 && column >= 0 && row < rows && column < columns && has(mask, first + row * wide + column);
    for (let row = 0; row < rows; row++, token += newline) {
      for (let column = 0; column < columns; column++, token++) {
        if (weights) pen.fillStyle = heat(weights[token] / 255);
        else if (mask !== null && !has(mask, token)) pen.fillStyle = "rgb(150 150 150 / .9)";
        else continue;
        pen.fillRect(x + column * unit, y + row * unit, unit, unit);
      }
    }
    if (mask !== null && !weights) { // kept patches are outlined: white on white would be lost
      pen.fillStyle = "rgb(213 94 0)";
      const t = Math.max(1, Math.round(unit / 12));
      for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
        if (!stays(row, column)) continue;
        const [left_, top_] = [x + column * unit, y + row * unit];
        if (!stays(row - 1, column)) pen.fillRect(left_, top_, unit, t);
        if (!stays(row + 1, column)) pen.fillRect(left_, top_ + unit - t, unit, t);
        if (!stays(row, column - 1)) pen.fillRect(left_, top_, t, unit);
        if (!stays(row, column + 1)) pen.fillRect(left_ + unit - t, top_, t, unit);
      }
    }
    pen.restore();
  });
}

// ---------------------------------------------------------------- start

byId("experiment").append(...data.experiments.map((one) => el("option", { value: one.name }, one.name)));
byId("experiment").addEventListener("change", (event) => choose(event.target.value));
byId("record").addEventListener("click", (event) => { if (event.target === byId("record")) byId("record").close(); });
summary();
choose(data.first);
byId("runs-body").append(grid({ ...data.overview, link: 0 }, "runs", true));
document.documentElement.dataset.ready = String(Math.round(performance.now()));

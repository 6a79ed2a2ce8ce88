// The charts. Plotly lies in the page, packed; it is unpacked here, so that nothing is loaded from anywhere.
const data = JSON.parse(byId("data").textContent);
/* Okabe and Ito's colours; the baseline has that of the text. Dash and marker differ as well, for any eye and for paper. */
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "hexagram"];
const ENDS = { stopped: "cross-thin-open", diverged: "x-thin-open", failed: "x-thin-open" };
const CHARTS = ["loss-chart", "memory-chart", "rates-chart"];
const NARROW_PX = 560;
const PAPER_PX = 660;
const MOST_AT_ONCE = 10; // lines in one box when the pointer rests
const MOST_LETTERS = 24; // of a name beside a point
/* Plotly takes markers of several sizes for bubbles, and would outline them and let them shine through. */
const FILLED = { opacity: 1, line: { width: 0 } };
const NOTHING = {
  xaxis: { visible: false }, yaxis: { visible: false },
  annotations: [{ text: "Nothing to draw: no run that is shown got this far.", showarrow: false, xref: "paper", yref: "paper" }],
};

const hidden = new Set();
let onPaper = false;

/* Text from a user, where Plotly would read tags. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const short = (text) => (text.length > MOST_LETTERS ? `${text.slice(0, MOST_LETTERS - 1)}…` : text);

/* A colour of the style sheet as it is now: the probe resolves light-dark(). */
function colour(name) {
  const probe = byId("keys");
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.style.color = "";
  return found;
}

/* How a label looks in every chart: by its place among the labels, which no sorting changes. */
function looks(label) {
  const others = data.labels.filter((each) => each !== data.baseline);
  if (label === data.baseline) return { colour: colour("ink"), dash: "solid", marker: MARKERS[0] };
  const place = others.indexOf(label);
  const round = Math.floor(place / COLOURS.length);
  return {
    colour: COLOURS[place % COLOURS.length],
    dash: DASHES[(place + 1 + round) % DASHES.length],
    marker: MARKERS[(place + 1 + 3 * round) % MARKERS.length],
  };
}

const fixed = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const score = (value) => `${data.metric} ${fixed(value, value < 1000 ? data.digits : 0)}`;
const chosen = (name) => byId("loss-controls").querySelector(`[name=${name}]:checked`)?.value ?? false;

/* A unit for all of an axis: what its largest value reads well in. */
function unitOf(largest, units) {
  return units.find(([, size]) => largest >= size) ?? units.at(-1);
}
const TIMES = [["h", 7200], ["min", 120], ["s", 1]];
const BYTES = [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["bytes", 1]];
const SECONDS = { h: 3600, min: 60, s: 1 };

/* --- what all charts share */
function layoutFor(id, own) {
  const text = colour("ink");
  const family = getComputedStyle(document.body).fontFamily;
  const axis = {
    gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, showline: true, ticks: "outside",
    tickcolor: colour("line"), automargin: true, exponentformat: "B", spikecolor: colour("muted"), spikethickness: 1, spikedash: "solid", title: { standoff: 10 },
  };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, margin: { l: 8, r: 16, t: 26, b: 8 },
    font: { family, size: 13, color: text },
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { family, color: text, size: 13 }, align: "left" },
    hovermode: "closest", hoverdistance: 60,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
    uirevision: id,
    ...own,
    xaxis: { ...axis, ...own.xaxis },
    yaxis: { ...axis, ...own.yaxis },
  };
  if (onPaper) layout.width = PAPER_PX;
  return layout;
}

function show(id, traces, layout) {
  const chart = byId(id);
  if (!traces.length) Object.assign(layout, NOTHING);
  const narrow = chart.clientWidth < NARROW_PX;
  const config = {
    displaylogo: false, responsive: true, displayModeBar: narrow ? false : "hover",
    // These and no others: "Share chart" would send the numbers to a server, and is there by default.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    showSendToCloud: false, plotlyServerURL: "", toImageButtonOptions: { format: "svg", filename: id },
  };
  const plot = chart.querySelector(".plot");
  window.Plotly.react(plot, traces, layoutFor(id, layout), config);
  if (!onPaper && plot.clientWidth !== plot._fullLayout?.width) window.Plotly.Plots.resize(plot);
}

/* --- loss over training */
function drawLoss() {
  const [kind, x, all] = [chosen("curve"), chosen("x"), chosen("all")];
  const runs = data.runs.filter((run) => !hidden.has(run.label) && (all || run.best) && run[kind].loss.length);
  const largest = Math.max(1, ...runs.map((run) => run[kind].time_s.at(-1)));
  const [unit] = unitOf(largest, TIMES);
  const across = (run) => (x === "tokens" ? run[kind].tokens : run[kind].time_s.map((time) => time / SECONDS[unit]));
  const unified = x === "tokens" && runs.length <= MOST_AT_ONCE && byId("loss-chart").clientWidth >= NARROW_PX;
  const traces = runs.map((run) => ({
    ...lossTrace(run, kind, across(run)),
    hovertemplate: unified
      ? "%{y:.4f}%{text}"
      : `<b>%{meta}</b><br>learning rate ${run.lr}, seed ${run.seed}<br>`
        + `%{x:${x === "tokens" ? "," : ".1f"}} ${x === "tokens" ? "tokens" : unit}<br>loss %{y:.4f}%{text}<extra></extra>`,
  }));
  const logx = chosen("logx");
  const xaxis = { title: { text: x === "tokens" ? "training tokens" : `training time (${unit})` }, type: logx ? "log" : "linear" };
  const yaxis = { title: { text: data.loss[kind] }, type: chosen("logy") ? "log" : "linear" };
  if (chosen("late")) zoomLate(traces, xaxis, yaxis);
  const state = [kind, x, logx, chosen("logy"), chosen("late")].join();
  show("loss-chart", traces, { xaxis, yaxis, uirevision: state, hovermode: unified ? "x unified" : "closest" });
}

function lossTrace(run, kind, x) {
  const { colour: line, dash, marker } = looks(run.label);
  const name = plain(run.label) + (run.best ? "" : `, rate ${run.lr}`) + (data.seeds > 1 ? `, seed ${run.seed}` : "");
  const perplexity = data.metric === "perplexity" ? run[kind].loss.map((loss) => ` (perplexity ${fixed(Math.exp(loss), loss < 7 ? 2 : 0)})`) : [];
  const last = x.length - 1;
  const ended = ENDS[run.outcome];
  const dots = kind === "validation";
  return {
    x, y: run[kind].loss, name, meta: plain(run.label), text: perplexity, mode: dots || ended ? "lines+markers" : "lines", opacity: run.best ? 1 : 0.45,
    line: { color: line, dash, width: run.best ? (data.seeds > 1 ? 1.6 : 2.2) : 1.2 },
    marker: {
      color: line, opacity: 1,
      symbol: x.map((_, place) => (ended && place === last ? ended : marker)),
      size: x.map((_, place) => (ended && place === last ? 11 : dots ? 6.5 : 0.1)),
      line: { width: x.map((_, place) => (ended && place === last ? 2.5 : 0)), color: line },
    },
  };
}

/* The second half of training alone, where methods part by little. */
function zoomLate(traces, xaxis, yaxis) {
  const end = Math.max(...traces.flatMap((trace) => trace.x));
  const late = traces.flatMap((trace) => trace.y.filter((_, place) => trace.x[place] >= end / 2));
  if (!late.length) return;
  const scale = (axis, value) => (axis.type === "log" ? Math.log10(value) : value);
  const [low, high] = [scale(yaxis, Math.min(...late)), scale(yaxis, Math.max(...late))];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.01;
  xaxis.range = [scale(xaxis, end / 2), scale(xaxis, end * 1.01)];
  yaxis.range = [low - margin, high + margin];
}

/* --- score against memory */
function drawMemory() {
  const rows = data.rows.filter((row) => !hidden.has(row.label) && row.score !== null && row.memory !== null);
  const [unit, size] = unitOf(Math.max(1, ...rows.map((row) => row.memory)), BYTES);
  const places = spread(rows.map((row) => [row.memory / size, row.score]), rows.map((row) => short(row.label).length));
  const traces = rows.map((row, place) => {
    const { colour: fill, marker } = looks(row.label);
    return {
      x: [row.memory / size], y: [row.score], mode: "markers+text", text: [plain(short(row.label))], textposition: places[place],
      cliponaxis: false, marker: { color: fill, symbol: marker, size: 12 }, name: plain(row.label),
      hovertemplate: "<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
      customdata: [[`learning rate ${row.lr}`, `${fixed(row.memory / size, 1)} ${unit}`, score(row.score)].join("<br>")],
    };
  });
  const yaxis = { title: { text: data.metric }, ...roomy(rows.map((row) => row.score)) };
  const xaxis = { title: { text: `model memory (${unit})` }, ...roomy(rows.map((row) => row.memory / size)) };
  show("memory-chart", traces, { xaxis, yaxis });
}

/* A range with room for the names beside the outermost points. */
function roomy(values, room = 0.16) {
  if (!values.length) return {};
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = (high - low) * room || Math.abs(high) * 0.1 || 1;
  return { range: [low - margin, high + margin] };
}

/* Where each point's name stands, so that names do not cover each other or another point; sizes are about right. */
function spread(points, lengths) {
  const chart = byId("memory-chart");
  const [width, height] = [chart.clientWidth * 0.8 || 400, chart.clientHeight * 0.75 || 300];
  const pixels = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    const range = roomy(values).range ?? [0, 1];
    return values.map((value) => ((value - range[0]) / (range[1] - range[0])) * (axis ? height : width));
  });
  const taken = points.map((_, place) => [pixels[0][place] - 7, pixels[1][place] - 7, 14, 14]);
  const overlap = (a, b) => Math.max(0, Math.min(a[0] + a[2], b[0] + b[2]) - Math.max(a[0], b[0]))
    * Math.max(0, Math.min(a[1] + a[3], b[1] + b[3]) - Math.max(a[1], b[1]));
  return points.map((_, place) => {
    const [x, y, wide] = [pixels[0][place], pixels[1][place], lengths[place] * 7.5];
    const boxes = {
      "top center": [x - wide / 2, y + 7, wide, 16], "bottom center": [x - wide / 2, y - 23, wide, 16],
      "middle right": [x + 10, y - 8, wide, 16], "middle left": [x - 10 - wide, y - 8, wide, 16],
    };
    const cost = (box) => taken.reduce((sum, other, each) => sum + (each === place ? 0 : overlap(box, other)), 0)
      + 50 * Math.max(0, -box[0], box[0] + box[2] - width);
    const best = Object.entries(boxes).reduce((a, b) => (cost(b[1]) < cost(a[1]) ? b : a));
    taken.push(best[1]);
    return best[0];
  });
}

/* --- score against learning rate */
function drawRates() {
  const rows = data.rows.filter((row) => !hidden.has(row.label));
  const without = rows.filter((row) => row.grid.some(([, value]) => typeof value === "string"));
  const scored = rows.some((row) => row.grid.some(([, value]) => typeof value === "number"));
  const strip = scored ? Math.min(0.4, without.length * 0.055) : 1;
  const traces = rows.flatMap((row) => rateTraces(row, without.indexOf(row)));
  const rates = [...new Set(rows.flatMap((row) => row.grid.map(([rate]) => rate)))].sort((a, b) => a - b);
  const range = roomy(rates.map(Math.log10), 0.05).range;
  show("rates-chart", traces, {
    xaxis: { title: { text: "learning rate" }, type: "log", tickvals: rates, ticktext: rates.map(String), range, anchor: "y" },
    yaxis: scored ? { title: { text: data.metric }, domain: [0, 1 - strip - (strip && 0.04)] } : { visible: false },
    yaxis2: { domain: [1 - strip, 1], range: [-0.5, Math.max(without.length, 1) - 0.5], visible: false, fixedrange: true },
  });
}

function rateTraces(row, rung) {
  const { colour: line, dash, marker } = looks(row.label);
  const scored = row.grid.filter(([, value]) => typeof value === "number");
  const ended = row.grid.filter(([, value]) => typeof value === "string");
  const common = { name: plain(row.label), hovertemplate: "<b>%{fullData.name}</b><br>learning rate %{x}<br>%{customdata}<extra></extra>" };
  const again = row.scores.slice(1);
  return [
    {
      ...common, x: scored.map(([rate]) => rate), y: scored.map(([, value]) => value), mode: "lines+markers",
      line: { color: line, dash, width: 2 }, marker: { symbol: marker, color: line, size: scored.map(([rate]) => (rate === row.lr ? 11 : 7)), ...FILLED },
      customdata: scored.map(([rate, value]) => score(value) + (rate === row.lr ? ", its best" : "")),
    },
    {
      ...common, x: again.map(() => row.lr), y: again.map(([, value]) => value), mode: "markers",
      marker: { symbol: `${marker}-open`, color: line, size: 8 }, customdata: again.map(([seed, value]) => `${score(value)}, seed ${seed}`),
    },
    {
      ...common, x: ended.map(([rate]) => rate), y: ended.map(() => rung), yaxis: "y2", mode: "markers", cliponaxis: false,
      marker: { symbol: ended.map(([, word]) => ENDS[word] ?? "circle-open"), size: 9, color: line, line: { width: 2.5, color: line } },
      customdata: ended.map(([, word]) => word),
    },
  ].filter((trace) => trace.x.length);
}

/* --- the key of all charts, and a swatch beside each name of a table */
function swatch(label) {
  const { colour: line, dash, marker } = looks(label);
  const strokes = { solid: "", dash: "6 3", dot: "2 3", dashdot: "6 3 2 3", longdash: "9 3", longdashdot: "9 3 2 3" };
  const shapes = {
    circle: "M12 4a4 4 0 1 0 .01 0Z", square: "M8.5 4.5h7v7h-7Z", diamond: "M12 3l5 5-5 5-5-5Z", "triangle-up": "M12 3.5l4.6 8H7.4Z",
    "triangle-down": "M12 12.5l4.6-8H7.4Z", pentagon: "M12 3.2l4.6 3.4-1.8 5.4H9.2L7.4 6.6Z",
    star: "M12 2.6l1.6 3.5 3.8.4-2.9 2.5.9 3.8-3.4-2-3.4 2 .9-3.8-2.9-2.5 3.8-.4Z", hexagram: "M12 2.8l1.5 2.6h3L15 8l1.5 2.6h-3L12 13.2l-1.5-2.6h-3L9 8 7.5 5.4h3Z",
  };
  const holder = document.createElement("span");
  holder.innerHTML = `<svg class="swatch" width="32" height="16" viewBox="-4 0 32 16" aria-hidden="true"><path d="M-4 8h32" stroke="${line}" stroke-width="2" `
    + `stroke-dasharray="${strokes[dash]}"/><path d="${shapes[marker]}" fill="${line}"/></svg>`;
  return holder.firstChild;
}

function drawKeys() {
  byId("keys").replaceChildren(...data.labels.map((label) => {
    const [key, box] = [document.createElement("label"), document.createElement("input")];
    box.type = "checkbox";
    box.checked = !hidden.has(label);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(label);
      else hidden.add(label);
      drawCharts();
    });
    key.append(box, swatch(label), label);
    return key;
  }));
  for (const cell of document.querySelectorAll("th[data-label]")) {
    cell.querySelector(".swatch")?.remove();
    cell.prepend(swatch(cell.dataset.label));
  }
}

function drawCharts() {
  if (!window.Plotly) return;
  drawLoss();
  drawMemory();
  drawRates();
}

function drawAll(how = {}) {
  onPaper = how.onPaper ?? onPaper;
  drawKeys();
  drawCharts();
}

/* --- Plotly, unpacked */
async function unpack() {
  const packed = Uint8Array.from(atob(byId("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function say(words) {
  for (const id of CHARTS) byId(id).replaceChildren(Object.assign(document.createElement("p"), { textContent: words }));
}

function prepareControls() {
  const controls = byId("loss-controls");
  for (const kind of ["validation", "train"]) {
    controls.querySelector(`[value=${kind}]`).disabled = !data.runs.some((run) => run[kind].loss.length);
  }
  controls.querySelector("[name=curve]:not(:disabled)")?.click();
  controls.querySelector("[name=all]").checked = !data.runs.some((run) => run.best); // else there is no curve to see
  controls.addEventListener("change", () => window.Plotly && drawLoss());
}

function giveUp(why) {
  say(`${why} Every number is in the tables.`);
  root.dataset.charts = "unavailable";
}

async function start() {
  drawKeys();
  listenToTheme(() => drawAll());
  listenToPrinting(drawAll);
  prepareControls();
  if (typeof DecompressionStream === "undefined") {
    giveUp("This browser cannot unpack the charts: it has no DecompressionStream.");
    return;
  }
  say("Drawing …");
  await unpack();
  for (const id of CHARTS) byId(id).replaceChildren(Object.assign(document.createElement("div"), { className: "plot" }));
  drawCharts();
  root.dataset.charts = "drawn";
}

start().catch((error) => giveUp(`The charts could not be drawn (${error.message}).`));

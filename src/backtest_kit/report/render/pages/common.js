"use strict";
const fail = text => { document.body.dataset.error = (document.body.dataset.error || "") + text + "\n"; };
addEventListener("error", event => fail(event.message || String(event.target)), true);
addEventListener("unhandledrejection", event => fail(String(event.reason)));
addEventListener("securitypolicyviolation", event => fail(`blocked ${event.violatedDirective} ${event.blockedURI}`));

const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (tag, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const tone = text => /^\+/.test(text) ? "gain" : /^-\d/.test(text) ? "loss" : "";

// Tables

const cells = (tag, row, numeric) => {
  const line = make("tr");
  row.forEach((text, i) => {
    const cell = make(tag, text, numeric[i] ? tone(text) : "text");
    if (text.length > 30) cell.title = text;
    line.append(cell);
  });
  return line;
};
const plainTable = (content, texts = 1) => {
  const table = make("table"), numeric = content.header.map((_, i) => i >= texts);
  const head = make("thead"), body = make("tbody");
  head.append(cells("th", content.header, numeric));
  body.append(...content.rows.map(row => cells("td", row, numeric)));
  table.append(head, body);
  if (content.total) {
    const foot = make("tfoot");
    foot.append(cells("td", content.total, numeric));
    table.append(foot);
  }
  return table;
};

// A row that does something when it is clicked does the same on Enter.
const actsOn = (row, act) => {
  row.classList.add("acts");
  row.tabIndex = 0;
  row.addEventListener("click", act);
  row.addEventListener("keydown", event => { if (event.key === "Enter") act(); });
};
const heatTable = content => {
  const table = plainTable(content);
  [...table.tBodies[0].rows].forEach((line, row) => content.tones[row].forEach((tone, i) => {
    if (!tone) return;
    const share = Math.round(Math.abs(tone) * 45), cell = line.cells[i + 1];
    cell.className = "";
    cell.style.background = `color-mix(in srgb, var(--${tone > 0 ? "gain" : "loss"}) ${share}%, transparent)`;
  }));
  table.className = "heat";
  return table;
};

at("title").textContent = data.title;
at("where").textContent = data.where;
data.remarks.forEach(text => at("remarks").append(make("p", `${text}.`, "remark")));
data.cards.forEach(([label, text]) => {
  const card = make("div");
  card.append(make("span", label), make("b", text, tone(text)));
  at("cards").append(card);
});

// Charts

const {createChart, createSeriesMarkers, BaselineSeries, AreaSeries, LineSeries, CandlestickSeries} = LightweightCharts;
const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const faded = (name, opacity) => color(name) + Math.round(opacity * 255).toString(16).padStart(2, "0");
const themed = [];  // one function per chart that colours it again
const look = () => ({
  layout: {
    background: {color: "transparent"}, textColor: color("muted"), panes: {separatorColor: color("line")},
    fontFamily: getComputedStyle(document.body).fontFamily,
  },
  grid: {vertLines: {color: color("line")}, horzLines: {color: color("line")}},
  rightPriceScale: {borderColor: color("line")},
  timeScale: {borderColor: color("line")},
});
const newChart = box => {
  const wheel = on => ({handleScroll: {mouseWheel: on, vertTouchDrag: false}, handleScale: {mouseWheel: on}});
  const chart = createChart(box, {
    autoSize: true, localization: {locale: "en-GB", dateFormat: "yyyy-MM-dd"},
    timeScale: {timeVisible: true, secondsVisible: false, minBarSpacing: 0.01},
    crosshair: {mode: 0}, ...wheel(false),
  });
  chart.applyOptions(look());
  // A page of charts must scroll: the wheel belongs to a chart only once it was clicked.
  box.addEventListener("pointerdown", () => chart.applyOptions(wheel(true)));
  box.addEventListener("pointerleave", () => chart.applyOptions(wheel(false)));
  return chart;
};
const evenly = ({start, step}, values) =>
  values.map((value, i) => value === null ? {time: start + i * step} : {time: start + i * step, value});
const percentFormat = {type: "custom", minMove: 0.01, formatter: value => `${value.toFixed(2)} %`};
const ready = () => {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => themed.forEach(paint => paint()));
  document.body.dataset.ready = "1";
};

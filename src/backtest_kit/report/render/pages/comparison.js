const drawRanking = () => {
  const table = plainTable(data.ranked, 2);
  at("ranked").append(table);
  data.failures.forEach(text => at("failures").append(make("p", text, "loss")));
  return [...table.tBodies[0].rows];
};

const drawBars = bars => {
  at("metric").textContent = data.metric;
  const values = bars.map(([value]) => value || 0), low = Math.min(0, ...values), high = Math.max(0, ...values);
  const span = high - low || 1, share = value => `${value / span * 100}%`;
  bars.forEach(([value, text], i) => {
    const line = make("div"), track = make("div", undefined, "track"), bar = make("div", undefined, value < 0 ? "below" : "above");
    bar.style.left = share(Math.min(value || 0, 0) - low);
    bar.style.width = share(Math.abs(value || 0));
    track.append(bar);
    line.append(make("span", data.names[i], "name"), track, make("b", text));
    line.title = data.names[i];
    at("bars").append(line);
  });
};

// Curves: the first ones in colours of their own, the rest in grey until one is chosen.
const COLORS = 8;
const drawCurves = (curves, rows) => {
  const chart = newChart(at("curves"));
  const series = curves.lines.map(values => {
    const line = chart.addSeries(LineSeries, {
      lineType: 1, priceLineVisible: false, lastValueVisible: false, crosshairMarkerVisible: false, priceFormat: percentFormat,
    });
    line.setData(values.length ? evenly(curves, values) : []);
    return line;
  });
  let chosen = -1;
  const tint = i => color(i < COLORS ? `series-${i + 1}` : i === chosen ? "accent" : "even");
  const chips = new Map();
  curves.lines.forEach((values, i) => {
    if (!values.length || i >= COLORS) return;
    const chip = make("button"), dot = make("i"), value = make("span");
    chip.type = "button";
    dot.style.background = `var(--series-${i + 1})`;
    chip.append(dot, make("span", data.names[i]), value);
    chips.set(i, [chip, value]);
    at("names").append(chip);
  });
  const others = curves.lines.filter((values, i) => values.length && i >= COLORS).length;
  if (others) at("names").append(make("span", `and ${others} more in grey`, "muted"));
  const paint = () => {
    chart.applyOptions(look());
    series.forEach((line, i) => line.applyOptions({
      color: chosen >= 0 && i !== chosen ? tint(i) + "40" : i >= COLORS && i !== chosen ? tint(i) + "80" : tint(i),
      lineWidth: i === chosen ? 3 : i >= COLORS ? 1 : 2,
    }));
    if (chosen >= 0) series[chosen].setSeriesOrder(series.length - 1);
    chips.forEach(([chip], i) => chip.setAttribute("aria-pressed", i === chosen));
    rows.forEach((row, i) => row.classList.toggle("chosen", i === chosen));
  };
  const choose = i => { chosen = i === chosen || !curves.lines[i].length ? -1 : i; paint(); };
  chips.forEach(([chip], i) => chip.addEventListener("click", () => choose(i)));
  rows.forEach((row, i) => actsOn(row, () => choose(i)));
  chart.subscribeCrosshairMove(event => chips.forEach(([, value], i) => {
    const point = event.seriesData.get(series[i]);
    value.textContent = point && point.value !== undefined ? ` ${point.value.toFixed(2)} %` : "";
  }));
  paint();
  themed.push(paint);
  chart.timeScale().fitContent();
};

const rows = drawRanking();
if (data.bars.length) drawBars(data.bars);
else at("bars-section").hidden = true;
if (data.curves) drawCurves(data.curves, rows);
else at("curves-section").hidden = true;
if (data.heat.rows.length) at("heat").append(heatTable(data.heat));
else at("heat-section").hidden = true;
ready();

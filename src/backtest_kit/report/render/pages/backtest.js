at("summary").append(plainTable(data.summary));
if (data.heat) at("heat").append(heatTable(data.heat));
else at("heat-section").hidden = true;
at("reasons").append(data.reasons.rows.length ? plainTable(data.reasons) : make("p", "No trades.", "muted"));
data.statistics.forEach(([label, text]) => {
  const line = make("div");
  line.append(make("dt", label), make("dd", text, tone(text)));
  at("statistics").append(line);
});

const trades = {rows: data.trades, order: null, descending: false, symbol: "", shown: 250};
const symbolAt = data.columns.findIndex(([label]) => label === "Symbol");
const showOnChart = new Map();  // by row of the trades table
const tradeBody = make("tbody"), tradeHead = make("tr");
const showTrades = () => {
  const kept = trades.rows.filter(row => !trades.symbol || row[symbolAt] === trades.symbol);
  if (trades.order !== null) {
    const i = trades.order, numeric = data.columns[i][1], sign = trades.descending ? -1 : 1;
    const value = row => numeric ? (Number.parseFloat(row[i]) || 0) : row[i];
    kept.sort((a, b) => sign * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
  }
  const numeric = data.columns.map(column => column[1]);
  tradeBody.replaceChildren(...kept.slice(0, trades.shown).map(row => {
    const line = cells("td", row, numeric);
    if (showOnChart.has(row)) actsOn(line, showOnChart.get(row));
    return line;
  }));
  at("trades-title").textContent = `Trades (${kept.length})`;
  at("more").hidden = kept.length <= trades.shown;
  at("more").textContent = `Show ${Math.min(1000, kept.length - trades.shown)} more of ${kept.length}`;
};
data.columns.forEach(([label, numeric], i) => {
  const head = make("th", undefined, numeric ? "" : "text"), button = make("button", label);
  button.addEventListener("click", () => {
    trades.descending = trades.order === i && !trades.descending;
    trades.order = i;
    [...tradeHead.children].forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", trades.descending ? "descending" : "ascending");
    showTrades();
  });
  head.append(button);
  tradeHead.append(head);
});
const tradeTable = make("table"), tradeTop = make("thead");
tradeTop.append(tradeHead);
tradeTable.append(tradeTop, tradeBody);
at("trades").append(tradeTable);
at("more").addEventListener("click", () => { trades.shown += 1000; showTrades(); });
const symbols = [...new Set(data.trades.map(row => row[symbolAt]))];
at("filter").hidden = symbols.length < 2;
at("filter").append(...["", ...symbols].map(symbol => {
  const option = make("option", symbol || "All symbols");
  option.value = symbol;
  return option;
}));
at("filter").addEventListener("change", event => { trades.symbol = event.target.value; showTrades(); });


const drawEquity = ({start, step, equity, drawdown}) => {
  const chart = newChart(at("equity"));
  const shared = {lineType: 1, lineWidth: 2, priceLineVisible: false, priceFormat: percentFormat};
  const account = chart.addSeries(BaselineSeries, {...shared, baseValue: {type: "price", price: 0}, title: "Equity"});
  const fall = chart.addSeries(AreaSeries, {...shared, invertFilledArea: true, title: "Drawdown"}, 1);
  account.setData(evenly({start, step}, equity));
  fall.setData(evenly({start, step}, drawdown));
  chart.panes()[0].setStretchFactor(3);
  chart.panes()[1].setStretchFactor(1.4);
  const paint = () => {
    chart.applyOptions(look());
    account.applyOptions({
      topLineColor: color("gain"), topFillColor1: faded("gain", .25), topFillColor2: faded("gain", .03),
      bottomLineColor: color("loss"), bottomFillColor1: faded("loss", .03), bottomFillColor2: faded("loss", .25),
    });
    fall.applyOptions({lineColor: color("loss"), topColor: faded("loss", .05), bottomColor: faded("loss", .3)});
  };
  paint();
  themed.push(paint);
  chart.timeScale().fitContent();
};

const drawMarket = market => {
  const section = make("section"), legend = make("div", undefined, "legend"), box = make("div", undefined, "chart");
  section.append(make("h2", market.name), legend, box);
  at("markets").append(section);
  const chart = newChart(box);
  const series = chart.addSeries(CandlestickSeries, {
    borderVisible: false, priceLineVisible: false,
    priceFormat: {type: "price", precision: market.decimals, minMove: 10 ** -market.decimals},
  });
  series.setData(market.candles.map(([time, open, high, low, close]) => ({time, open, high, low, close})));
  const markers = createSeriesMarkers(series, []);
  const byTime = new Map();
  market.trades.forEach(trade => [trade.from, trade.to].forEach(time => {
    if (!byTime.has(time)) byTime.set(time, new Set());
    byTime.get(time).add(trade);
  }));
  let size = 1;
  const mark = () => markers.setMarkers(market.trades.flatMap(trade => {
    const tint = color(trade.outcome);
    const entry = {time: trade.from, color: tint, size, shape: trade.long ? "arrowUp" : "arrowDown", position: trade.long ? "belowBar" : "aboveBar"};
    const exit = {time: trade.to, color: tint, size: size * .7, shape: "circle", position: "atPriceMiddle", price: trade.exit};
    const added = trade.added.map(time => ({...entry, time, size: size * .6}));
    const reduced = trade.reduced.map(([time, price]) => ({time, price, color: tint, size: size * .6, shape: "square", position: "atPriceMiddle"}));
    return size < .5 ? [entry] : [entry, ...added, ...reduced, exit];
  }).sort((a, b) => a.time - b.time));
  const paint = () => {
    chart.applyOptions(look());
    series.applyOptions({
      upColor: faded("gain", .55), wickUpColor: faded("gain", .7),
      downColor: faded("loss", .55), wickDownColor: faded("loss", .7),
    });
    mark();
  };
  paint();
  themed.push(paint);
  const legendFor = event => {
    const bar = event && event.time !== undefined ? event.seriesData.get(series) : undefined;
    if (!bar) {
      legend.replaceChildren(make("div", "Arrow: entry, up for long, down for short; a small one was added. Square: a part closed. Dot: exit. Green earned, red lost. A trade under the cursor shows its levels; dashed, as they were set."));
      return;
    }
    const number = value => value.toFixed(market.decimals);
    const when = new Date(event.time * 1000).toISOString().slice(0, 16).replace("T", " ");
    legend.replaceChildren(make("div", `${when}  O ${number(bar.open)}  H ${number(bar.high)}  L ${number(bar.low)}  C ${number(bar.close)}`));
    const here = [...(byTime.get(event.time) || [])];
    if (here.length) {
      const more = here.length > 1 ? `  (+${here.length - 1} more)` : "";
      legend.append(make("div", here[0].text + more, here[0].outcome));
    }
  };
  legendFor();

  // Take profit and stop loss at the close, as they were set, and the effective entry, over the life of one trade.
  const levels = [["gain", 0, 2], ["loss", 0, 2], ["gain", 2, 1], ["loss", 2, 1], ["accent", 3, 1]].map(([name, lineStyle, lineWidth]) => {
    const line = chart.addSeries(LineSeries, {
      lineStyle, lineWidth, priceLineVisible: false, lastValueVisible: false, crosshairMarkerVisible: false,
      autoscaleInfoProvider: () => null,
    });
    const paintLine = () => line.applyOptions({color: color(name)});
    paintLine();
    themed.push(paintLine);
    return line;
  });
  let chosen = null, drawn = null;
  const showLevels = trade => {
    if (trade === drawn) return;
    drawn = trade;
    levels.forEach((line, i) => {
      const moved = trade && (i < 2 || i > 3 || trade.levels[i] !== trade.levels[i - 2]);
      const times = trade ? [...new Set([trade.from, trade.to])] : [];
      line.setData(moved ? times.map(time => ({time, value: trade.levels[i]})) : []);
    });
  };
  const under = time => market.trades.findLast(trade => trade.from <= time && time <= trade.to);
  chart.subscribeCrosshairMove(event => {
    legendFor(event);
    showLevels((event.time !== undefined && under(event.time)) || chosen);
  });
  market.trades.forEach(trade => showOnChart.set(data.trades[trade.row], () => {
    const times = market.candles.map(candle => candle[0]), first = times.indexOf(trade.from), last = times.indexOf(trade.to);
    const margin = Math.max(30, last - first);
    chart.timeScale().setVisibleLogicalRange({from: first - margin, to: last + margin});
    chosen = trade;
    showLevels(trade);
    section.scrollIntoView({block: "center"});
  }));
  // Many marks at once would hide the candles under them.
  chart.timeScale().subscribeVisibleTimeRangeChange(range => {
    const seen = range ? market.trades.filter(trade => trade.to >= range.from && trade.from <= range.to).length : 0;
    const fitting = seen > 120 ? .3 : seen > 40 ? .6 : 1;
    if (fitting !== size) { size = fitting; mark(); }
  });
  chart.timeScale().fitContent();
};

if (data.equity) drawEquity(data.equity);
else at("equity-section").hidden = true;
data.markets.forEach(drawMarket);
showTrades();
ready();

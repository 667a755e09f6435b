"use strict";
// The page's behaviour. All allocations were computed beforehand: the slider only selects among them.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const byId = (id) => document.getElementById(id);
  const views = {};
  const state = { axis: data.axes[0], shown: "best" };
  const SERIES = ["s1", "s2", "s3", "s4", "s5", "s6", "s7"].map((name) => `var(--${name})`);
  const SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"];
  const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 4], [1, 3], [12, 3, 2, 3, 2, 3]];

  // Formatting of numbers.
  const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
  const whole = (x) => grouped.format(x);
  const short = (x) => {
    if (x === 0 || (Math.abs(x) >= 0.001 && Math.abs(x) < 1e5)) return String(+x.toPrecision(3));
    const [mantissa, exponent] = x.toExponential(2).split("e");
    return `${+mantissa}e${+exponent}`;
  };
  const bytes = (x) => (x >= 1e6 ? `${(x / 1e6).toFixed(2)} MB` : `${(x / 1e3).toFixed(1)} kB`);
  const operations = (x) => (x >= 1e9 ? `${(x / 1e9).toPrecision(4)} G` : `${(x / 1e6).toPrecision(4)} M`);
  const withError = (value, error) => (error ? `${short(value)} ± ${short(+error.toPrecision(1))}` : short(value));
  const inUnit = (axis, x) => (axis.name === "size_bytes" ? bytes(x) : `${operations(x)}BitOps`);

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function table(caption, head, rows, current = -1) {
    const made = element("table", {}, element("caption", { textContent: caption }));
    made.append(element("thead", {}, element("tr", {}, ...head.map((text, i) => element("th", { scope: "col", textContent: text, className: i ? "" : "text" })))));
    made.append(element("tbody", {}, ...rows.map((row, n) => element("tr", { className: n === current ? "current" : "" },
      ...row.map((text, i) => element(i ? "td" : "th", i ? { textContent: text } : { textContent: text, scope: "row" }))))));
    return made;
  }

  // The allocation that is shown: the slider's, or one of the others.
  function point() {
    const other = data.others.find((found) => found.label === state.shown);
    return other ?? state.axis.points[+byId("budget").value];
  }

  // Charts. Colours are CSS variables, so that dark mode and print need no redraw.
  const CONFIG = {
    background: "transparent", font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", view: { stroke: "var(--line)" },
    axis: { labelColor: "var(--ink)", titleColor: "var(--ink)", domainColor: "var(--quiet)", tickColor: "var(--quiet)", gridColor: "var(--line)", labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" },
    legend: { labelColor: "var(--ink)", titleColor: "var(--ink)", labelFontSize: 12, orient: "top", title: null, symbolSize: 90, columns: 0 },
    text: { color: "var(--ink)", fontSize: 11 }, title: { color: "var(--ink)" }, aria: false,
  };

  async function draw(id, spec, label) {
    views[id]?.finalize();
    const place = byId(id);
    place.setAttribute("aria-label", label);
    const made = await vegaEmbed(place, { width: "container", height: 320, autosize: { type: "fit-x", contains: "padding" }, ...spec, config: CONFIG },
      { renderer: "svg", actions: false, mode: "vega-lite" });
    views[id] = made.view;
  }

  // Scores span decades and may be 0 or less: linear around 0, logarithmic beyond.
  const decades = ({ constant, ticks, domain }) => ({
    scale: { type: "symlog", constant, domain, nice: false },
    axis: { values: ticks, labelExpr: "datum.value && abs(datum.value) < 0.001 ? format(datum.value, '.0e') : '' + datum.value" },
  });
  const damageAxis = decades(data.damage);
  const damageTitle = `predicted damage (${data.criterion} score)`;

  function hereRows(found) {
    const { axis } = state;
    return [{ x: found[axis.name] / axis.unit, y: found.score, series: "shown here", text: inUnit(axis, found[axis.name]), damage: withError(found.score, found.error) }];
  }

  function drawCurve() {
    const { axis } = state, x = (found) => found[axis.name] / axis.unit;
    const rows = axis.points.map((found) => ({ x: x(found), y: found.score, low: found.score - found.error, high: found.score + found.error, series: "best within a budget", text: inUnit(axis, found[axis.name]), damage: withError(found.score, found.error) }));
    const others = data.others.map((found) => ({ x: x(found), y: found.score, series: found.kind, note: found.note, text: `${found.label}, ${inUnit(axis, found[axis.name])}`, damage: withError(found.score, found.error) }));
    const kinds = ["best within a budget", ...new Set(others.map((found) => found.series)), "shown here"];
    const scales = {
      color: { field: "series", type: "nominal", scale: { domain: kinds, range: [SERIES[0], SERIES[1], SERIES[2]].slice(0, kinds.length - 1).concat("var(--ink)") } },
      shape: { field: "series", type: "nominal", scale: { domain: kinds, range: ["circle", "square", "triangle-up"].slice(0, kinds.length - 1).concat("diamond") } },
    };
    const place = { x: { field: "x", type: "quantitative", title: axis.title, scale: { zero: false }, axis: { tickCount: 8 } }, y: { field: "y", type: "quantitative", title: damageTitle, ...damageAxis } };
    const tooltip = [{ field: "text", title: "allocation" }, { field: "damage", title: "predicted damage" }];
    return draw("curve", {
      datasets: { here: hereRows(point()) },
      layer: [
        { data: { values: rows }, mark: { type: "area", clip: true, opacity: 0.18, color: SERIES[0] }, encoding: { x: place.x, y: { ...place.y, field: "low" }, y2: { field: "high" } } },
        { data: { values: rows }, mark: { type: "line", color: SERIES[0], strokeWidth: 1.5 }, encoding: place },
        { data: { values: rows }, mark: { type: "point", filled: true, size: 26, opacity: 1 }, encoding: { ...place, ...scales, tooltip } },
        { data: { values: others }, mark: { type: "point", filled: true, size: 80, opacity: 1 }, encoding: { ...place, ...scales, tooltip } },
        { data: { values: others.filter((found) => found.series === "uniform") }, mark: { type: "text", align: "left", dx: 8, dy: -6 }, encoding: { ...place, text: { field: "note" } } },
        { data: { values: others.filter((found) => found.series !== "uniform") }, mark: { type: "text", align: "right", dx: -8, dy: 14 }, encoding: { ...place, text: { field: "note" } } },
        { data: { name: "here" }, mark: { type: "rule", strokeDash: [4, 4], color: "var(--quiet)" }, encoding: { x: place.x } },
        { data: { name: "here" }, mark: { type: "point", size: 260, strokeWidth: 3, filled: false, opacity: 1 }, encoding: { ...place, ...scales, tooltip } },
      ],
    }, `Chart of predicted damage against ${axis.label}; the numbers are in the table below it.`);
  }

  const names = () => data.sites.map((site) => site.name);
  const layerAxis = () => ({ field: "site", type: "ordinal", sort: null, title: null, axis: { labelAngle: -60, labelLimit: 130, labelFontSize: 10, labelOverlap: false, grid: false } });
  const widest = Math.max(8, ...data.sites.flatMap((site) => Object.keys({ ...site.scores, ...site.bytes }).map(Number)));
  const layerWidth = () => (names().length * 13 > byId("bits").clientWidth - 70 ? { width: names().length * 13, autosize: { type: "pad" } } : {});

  function bitRows(found) {
    return data.sites.map((site, i) => ({ site: site.name, kind: site.kind, bits: found.bits[i] }));
  }

  function drawBits() {
    const kinds = ["weight", "activation"].filter((kind) => data.sites.some((site) => site.kind === kind));
    const x = layerAxis(), y = { field: "bits", type: "quantitative", title: "bits", scale: { domain: [0, 1.08 * widest] }, axis: { values: [0, 2, 4, 6, 8, 16].filter((bits) => bits <= widest) } };
    const legend = kinds.length > 1 ? {} : { legend: null };
    return draw("bits", {
      ...layerWidth(), height: 190, data: { name: "bits", values: bitRows(point()) },
      layer: [
        { mark: { type: "bar", strokeWidth: 1.5, width: { band: 0.8 } }, encoding: { x, y,
          fill: { field: "kind", type: "nominal", scale: { domain: kinds, range: ["var(--s1)", "transparent"] }, ...legend },
          stroke: { field: "kind", type: "nominal", scale: { domain: kinds, range: ["var(--s1)", "var(--s2)"] }, ...legend } } },
        { mark: { type: "text", dy: -7 }, encoding: { x, y, text: { field: "bits" } } },
      ],
    }, "Bar chart of the bits of every layer; the same numbers are in the table of layers.");
  }

  function sensitivityRows() {
    const only = byId("sensitivity-bits").value;
    return data.sites.flatMap((site) => Object.entries(site.scores).map(([bits, [value, error]]) => (
      { site: site.name, bits: `${bits} bits`, score: value, low: value - error, high: value + error, text: withError(value, error) })))
      .filter((row) => only === "all" || row.bits === only);
  }

  function bySeries(field, domain) {
    const range = (values) => domain.map((_, i) => values[i % values.length]);
    return {
      color: { field, type: "nominal", scale: { domain, range: range(SERIES) } },
      shape: { field, type: "nominal", scale: { domain, range: range(SHAPES) } },
      strokeDash: { field, type: "nominal", scale: { domain, range: range(DASHES) } },
    };
  }

  const bitNames = () => [...new Set(data.sites.flatMap((site) => Object.keys(site.scores)))].sort((a, b) => a - b).map((bits) => `${bits} bits`);

  function drawSensitivity() {
    const { color, shape, strokeDash } = bySeries("bits", bitNames());
    const x = layerAxis(), y = { field: "score", type: "quantitative", title: `score of ${data.criterion}`, ...decades(data.spread) };
    return draw("sensitivity", {
      ...layerWidth(), height: 340, data: { name: "scores", values: sensitivityRows() },
      layer: [
        { mark: { type: "line", strokeWidth: 1.2 }, encoding: { x, y, color, strokeDash } },
        { mark: { type: "rule", clip: true, strokeWidth: 1.5 }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } },
        { mark: { type: "point", size: 34, filled: true, opacity: 1 }, encoding: { x, y, color, shape,
          tooltip: [{ field: "site", title: "layer" }, { field: "bits" }, { field: "text", title: "score" }] } },
      ],
    }, "Chart of the score of every layer at every bit-width with standard errors; the numbers are in the table below it.");
  }

  function drawAccuracy() {
    const { axis } = state;
    const rows = data.measured.map((found) => ({ ...found, x: found[axis.name] / axis.unit, low: found.accuracy - found.error, high: found.accuracy + found.error, text: withError(found.accuracy, found.error) }));
    const { color, shape, strokeDash } = bySeries("label", [...new Set(rows.map((row) => row.label))]);
    const x = { field: "x", type: "quantitative", title: axis.title, scale: { zero: false }, axis: { tickCount: 8 } }, y = { field: "accuracy", type: "quantitative", title: data.accuracy_name, scale: { zero: false } };
    const float = data.float_accuracy === null ? [] : [{ y: data.float_accuracy, text: `float ${short(data.float_accuracy)}` }];
    return draw("accuracy", {
      layer: [
        { data: { values: rows }, mark: { type: "line", strokeWidth: 1.2 }, encoding: { x, y, color, strokeDash } },
        { data: { values: rows }, mark: { type: "rule", strokeWidth: 1.5 }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } },
        { data: { values: rows }, mark: { type: "point", filled: true, size: 80, opacity: 1 }, encoding: { x, y, color, shape,
          tooltip: [{ field: "label", title: "allocation" }, { field: "budget" }, { field: "text", title: data.accuracy_name }] } },
        { data: { values: float }, mark: { type: "rule", strokeDash: [6, 3], color: "var(--quiet)" }, encoding: { y: { field: "y", type: "quantitative" } } },
        { data: { values: float }, mark: { type: "text", align: "left", dy: -7, dx: 4 }, encoding: { x: { value: 0 }, y: { field: "y", type: "quantitative" }, text: { field: "text" } } },
      ],
    }, `Chart of measured accuracy against ${axis.label}; the numbers are in the table below it.`);
  }

  function drawCorrelation() {
    const audited = data.correlations.find((found) => found.criterion === byId("criterion").value);
    const rows = audited.points.map(([site, bits, score, scoreError, drop, dropError]) => (
      { site, bits: `${bits} bits`, score, drop, left: score - scoreError, right: score + scoreError, low: drop - dropError, high: drop + dropError }));
    const { color, shape } = bySeries("bits", [...new Set(rows.map((row) => row.bits))].sort());
    const x = { field: "score", type: "quantitative", title: `score of ${audited.criterion}` }, y = { field: "drop", type: "quantitative", title: "accuracy drop [points]" };
    byId("correlation-caption").textContent = `One point per layer and bit-width, 4 bits and fewer; bars are standard errors. ${audited.r === null ? "" : `Pearson's r = ${audited.r.toFixed(2)} ± ${audited.r_error.toFixed(2)}, Spearman's ${audited.rank.toFixed(2)}.`}`;
    return draw("correlation", {
      data: { values: rows },
      layer: [
        { mark: { type: "rule", opacity: 0.5 }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } },
        { mark: { type: "rule", opacity: 0.5 }, encoding: { x: { ...x, field: "left" }, x2: { field: "right" }, y, color } },
        { mark: { type: "point", filled: true, size: 55, opacity: 1 }, encoding: { x, y, color, shape, tooltip: [{ field: "site", title: "layer" }, { field: "bits" }, { field: "score" }, { field: "drop" }] } },
      ],
    }, `Scatter of scores of ${audited.criterion} against the measured accuracy drop. ${byId("correlation-caption").textContent}`);
  }

  // The table of layers: one row per site, sortable by any column.
  const COLUMNS = [
    { name: "layer", value: (site) => site.index, text: (site) => site.name },
    { name: "kind", value: (site) => site.kind, text: (site) => site.kind, isText: true },
    { name: "bits", value: (site) => site.now, text: (site) => site.now },
    { name: "tied", value: (site) => site.tie ?? Infinity, text: (site) => (site.tie ? `tie ${site.tie}` : "–") },
    { name: "score", value: (site) => site.score?.[0] ?? -Infinity, text: (site) => (site.score ? withError(...site.score) : "fixed") },
    { name: "weights", value: (site) => site.weights, text: (site) => (site.kind === "weight" ? whole(site.weights) : "–") },
    { name: "MACs", value: (site) => site.macs, text: (site) => whole(site.macs) },
    { name: "bytes", value: (site) => site.size, text: (site) => (site.kind === "weight" ? whole(site.size) : "–") },
    { name: "share of size", value: (site) => site.size, text: (site) => (site.kind === "weight" ? `${site.share.toFixed(1)} %` : "–") },
  ].filter((column) => column.name !== "kind" || data.sites.some((site) => site.kind !== "weight"))
    .filter((column) => column.name !== "tied" || data.sites.some((site) => site.tie));
  const sorting = { column: 0, up: true };

  function meter(bits) {
    const blocks = element("i", { ariaHidden: "true" });
    for (let i = 1; i <= 8; i += 1) blocks.append(element("b", { className: i <= bits ? "on" : "" }));
    return element("span", { className: "meter" }, blocks, element("span", { className: "number", textContent: bits > 8 ? "float" : bits }));
  }

  function fillLayers(found) {
    const rows = data.sites.map((site, index) => {
      const now = found.bits[index], size = site.bytes[now] ?? 0;
      return { ...site, index, now, score: site.scores[now], size, share: 100 * size / found.size_bytes };
    });
    const { value } = COLUMNS[sorting.column], sign = sorting.up ? 1 : -1;
    rows.sort((a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : a.index - b.index));
    byId("layers").tBodies[0].replaceChildren(...rows.map((site) => {
      const row = element("tr", {}, ...COLUMNS.map((column, i) => {
        const cell = element(i ? "td" : "th", { className: column.isText ? "text" : column.name.replaceAll(" ", "-") });
        cell.append(column.name === "bits" ? meter(site.now) : String(column.text(site)));
        if (!i) Object.assign(cell, { scope: "row", title: site.name });
        return cell;
      }));
      row.dataset.site = site.name;
      return row;
    }));
    [...byId("layers").tHead.rows[0].cells].forEach((head, i) => head.setAttribute("aria-sort", i !== sorting.column ? "none" : sorting.up ? "ascending" : "descending"));
  }

  function buildLayers() {
    const heads = COLUMNS.map((column, i) => {
      const button = element("button", { type: "button", textContent: column.name });
      button.addEventListener("click", () => {
        Object.assign(sorting, { up: sorting.column === i ? !sorting.up : !i || Boolean(column.isText), column: i });
        fillLayers(point());
      });
      return element("th", { scope: "col", className: !i || column.isText ? "text" : "" }, button);
    });
    byId("layers").append(element("caption", { textContent: "All layers with the bits shown now. Click a column heading to sort." }),
      element("thead", {}, element("tr", {}, ...heads)), element("tbody"));
  }

  // What changes with the slider.
  function show() {
    const found = point(), { axis } = state, slider = byId("budget"), onSlider = state.shown === "best";
    slider.disabled = !onSlider;
    const limit = axis.points[+slider.value].limit;
    byId("limit").textContent = inUnit(axis, limit);
    slider.setAttribute("aria-valuetext", inUnit(axis, limit));
    const uniform = found.uniform_bits === null ? "none fits" : `${found.uniform_bits} bits: ${short(found.uniform_score)}`;
    const tiles = [["size", bytes(found.size_bytes), "size"], ["mean bits", found.weight_bits.toFixed(2), "mean"], ["compression", `${found.compression.toFixed(2)} ×`, "compression"],
      ["BitOps", operations(found.bitops), "bitops"], ["predicted damage", withError(found.score, found.error), "damage"],
      ...(onSlider ? [["uniform, same budget", uniform, "uniform"]] : [])];
    byId("tiles").replaceChildren(...tiles.map(([name, text, key]) => {
      const [value, error] = text.split(" ± ");
      const tile = element("div", {}, element("dt", { textContent: name }), element("dd", { }, value, ...(error ? [element("small", { textContent: ` ± ${error}` })] : [])));
      tile.dataset.key = key;
      return tile;
    }));
    const counts = {};
    data.sites.forEach((site, i) => { if (site.kind === "weight") counts[found.bits[i]] = (counts[found.bits[i]] ?? 0) + 1; });
    byId("summary").textContent = `${onSlider ? `At most ${inUnit(axis, limit)}` : state.shown}: ${whole(found.size_bytes)} bytes, a mean of ${found.weight_bits.toFixed(2)} bits per weight, weights ${found.compression.toFixed(2)} times smaller, ${operations(found.bitops)} BitOps, predicted damage ${withError(found.score, found.error)}${onSlider ? ` (uniform in the same budget: ${uniform})` : ""}. Layers by bits: ${Object.entries(counts).map(([bits, count]) => `${count} at ${bits}`).join(", ")}.`;
    byId("bits-caption").textContent = `${onSlider ? `Best within ${inUnit(axis, limit)}` : state.shown}, layers in the order of the graph.`;
    fillLayers(found);
    const [exact, int8] = found.containers, float = data.float_bytes;
    byId("container-table").replaceChildren(table("Bytes of all parameters in each container, for the bits shown now", ["container", "bytes", "", "of float32"],
      [["exact (what a budget counts)", exact], ["int8", int8], ["float32", float]]
        .map(([name, size]) => [name, whole(size), bytes(size), `${(100 * size / float).toFixed(1)} %`])));
    byId("again").textContent = [`table = infoq_fx.SensitivityTable.load("scores.json")`,
      onSlider ? `allocation = infoq_fx.allocate(table, infoq_fx.Budget(${axis.name}=${limit})${data.options})` : `allocation = infoq_fx.Allocation(bits=${JSON.stringify(found.all_bits)})`,
      `quantized = infoq_fx.convert(prepared, allocation)  # prepared is what the table was scored on`, "", data.command].join("\n");
    views.curve?.data("here", hereRows(found)).runAsync();
    views.bits?.data("bits", bitRows(found)).runAsync();
    for (const [n, row] of [...byId("curve-table").querySelectorAll("tbody tr")].entries()) row.className = onSlider && n === +slider.value ? "current" : "";
  }

  function fillTables() {
    const { axis } = state, cells = (found) => [withError(found.score, found.error), whole(found.size_bytes), operations(found.bitops), found.weight_bits.toFixed(2), `${found.compression.toFixed(2)} ×`];
    const head = ["predicted damage", "bytes", "BitOps", "mean bits", "compression"];
    byId("curve-table").replaceChildren(table(`The best allocation within each budget of the slider`, [`at most (${axis.label})`, ...head, "best uniform"],
      axis.points.map((found) => [inUnit(axis, found.limit), ...cells(found), found.uniform_bits === null ? "none fits" : `${found.uniform_bits} bits: ${short(found.uniform_score)}`])));
    byId("uniform-table").replaceChildren(table("Allocations that are not on the curve", ["allocation", ...head], data.others.map((found) => [found.label, ...cells(found)])));
    byId("curve-caption").textContent = `Each point is the allocation of least total score within a budget, proven optimal by an integer program; the band is its standard error. ${data.note}`;
    byId("axis-name").textContent = axis.label;
  }

  function buildOnce() {
    const bits = bitNames();
    byId("sensitivity-bits").append(element("option", { value: "all", textContent: "all" }), ...bits.map((text) => element("option", { value: text, textContent: text })));
    byId("sensitivity-caption").textContent = "Score of every layer at every bit-width, in the order of the graph; bars are standard errors, smaller is less sensitive.";
    byId("sensitivity-table").append(table("Score ± standard error of every layer and bit-width", ["layer", ...bits],
      data.sites.filter((site) => Object.keys(site.scores).length).map((site) => [site.name, ...bits.map((text) => { const found = site.scores[parseInt(text, 10)]; return found ? withError(...found) : "–"; })])));
    byId("shown").append(element("option", { value: "best", textContent: "best within the budget" }), ...data.others.map((found) => element("option", { value: found.label, textContent: found.label })));
    byId("axis").append(...data.axes.map((axis, i) => element("label", {}, element("input", { type: "radio", name: "axis", value: axis.name, checked: i === 0 }), ` ${axis.label}`)));
    if (data.measured.length) {
      byId("measured").hidden = false;
      byId("accuracy-caption").textContent = data.measured_note;
      const others = [["nats", "nats lost"], ["metric", data.metric_name], ["sqnr_db", "smallest SQNR [dB]"]].filter(
        ([key, name]) => name !== data.accuracy_name && data.measured.some((found) => (found[key] ?? null) !== null));
      byId("accuracy-table").append(table("Measured accuracies", ["allocation", "budget", data.accuracy_name, ...others.map(([, name]) => name), "bytes", "BitOps", "predicted damage"],
        data.measured.map((found) => [found.label, found.budget, withError(found.accuracy, found.error), ...others.map(([key]) => ((found[key] ?? null) === null ? "–" : short(found[key]))),
          whole(found.size_bytes), operations(found.bitops), short(found.score)])));
    }
    if (data.correlations.length) {
      byId("audited").hidden = false;
      byId("criterion").append(...data.correlations.map(({ criterion }) => element("option", { value: criterion, textContent: criterion })));
      byId("correlation-table").append(table("Correlation of scores with the measured accuracy drop", ["criterion", "Pearson's r", "Spearman's r"],
        data.correlations.map((found) => [found.criterion, ...(found.r === null ? ["–", "–"] : [`${found.r.toFixed(2)} ± ${found.r_error.toFixed(2)}`, found.rank.toFixed(2)])])));
    }
    buildLayers();
  }

  function listen() {
    byId("budget").addEventListener("input", show);
    byId("shown").addEventListener("change", (event) => { state.shown = event.target.value; show(); });
    byId("axis").addEventListener("change", async (event) => {
      await chooseAxis(event.target.value, byId("budget").value / (state.axis.points.length - 1));
    });
    byId("sensitivity-bits").addEventListener("change", () => views.sensitivity.data("scores", sensitivityRows()).runAsync());
    byId("criterion").addEventListener("change", drawCorrelation);
    byId("save").addEventListener("click", () => {
      const file = URL.createObjectURL(new Blob([byId("report-scores").textContent], { type: "application/json" }));
      element("a", { href: file, download: "scores.json" }).click();
      URL.revokeObjectURL(file);
    });
  }

  async function chooseAxis(name, share) {
    state.axis = data.axes.find((axis) => axis.name === name);
    const last = state.axis.points.length - 1;
    byId("budget").max = last;
    byId("budget").value = Math.round(share * last);
    fillTables();
    show();
    await drawCurve();
    if (data.measured.length) await drawAccuracy();
    show();
  }

  async function start() {
    buildOnce();
    listen();
    await chooseAxis(data.axes[0].name, data.start);
    await drawBits();
    await drawSensitivity();
    if (data.correlations.length) await drawCorrelation();
    document.documentElement.dataset.ready = "yes";
  }

  start();
})();

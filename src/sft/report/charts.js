// Draws the charts of a page from its data: hover, drag to zoom, double click to reset, log scale, another x-axis.
// A point's x is its place in the list of steps of its run; runs[r][axis] has the value there by each axis.
"use strict";
const DATA = JSON.parse(document.getElementById("values").textContent);
const STATE = { axis: "step", log: false, zoom: null, hidden: new Set() };
const charts = [];

function svg(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function html(name, className, parent, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function format(value, digits = 4) {
  if (value === null) return "\u2013";
  const size = Math.abs(value);
  if (size >= 1e5 || (size < 1e-3 && size > 0)) {
    for (const [unit, sign] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (size >= unit && size < 1e15) return String(+(value / unit).toPrecision(digits)) + " " + sign;
    return (+value.toPrecision(digits)).toExponential().replace("e+", "e").replace("-", "\u2212");
  }
  return (+value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 8 }).replace("-", "\u2212");
}

// Round values that divide a range into about `count` parts; of a logarithmic one powers of ten and parts of them.
function ticks(low, high, count, log) {
  if (log) {
    const found = [];
    const decades = Math.log10(high / low);
    const parts = decades > count ? [1] : decades > count / 2 ? [1, 3] : [1, 2, 5];
    const every = Math.max(1, Math.ceil(decades / count));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      if (power % every === 0) for (const part of parts) found.push(part * 10 ** power);
    const inside = found.filter((value) => value >= low && value <= high);
    if (inside.length > 1) return inside;
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((part) => part * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(low / size); at * size <= high * (1 + 1e-12); at++) found.push(+(at * size).toPrecision(12));
  return found;
}

// A chart's curves as points that can be drawn by the chosen axis and scale.
function curves(chart) {
  return chart.series.map((series, place) => {
    const axis = DATA.runs[series.run][STATE.axis];
    const points = series.x.map((at, index) => [axis[at], series.y[index]]);
    const shown = points.map(([x, y]) => [x, y === null || (STATE.log && y <= 0) ? null : y]);
    return { ...series, place, points: shown, hidden: STATE.hidden.has(chart.title + "/" + series.name) };
  });
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function draw(chart) {
  const { figure } = chart;
  const width = figure.clientWidth - 24, height = figure.classList.contains("wide") ? 300 : 210;
  if (width < 60) return;
  const all = curves(chart.spec), visible = all.filter((curve) => !curve.hidden);
  let [left, right] = STATE.zoom || range(DATA.runs.flatMap((run) => run[STATE.axis])); // the same in all charts
  if (!(right > left)) [left, right] = [left - 0.5, left + 0.5];
  const inside = visible.flatMap((curve) => {
    const near = curve.points.filter(([x, y]) => x >= left && x <= right && y !== null);
    return near.map((point) => point[1]);
  });
  let [low, high] = inside.length ? range(inside) : STATE.log ? [0.1, 1] : [0, 1];
  if (STATE.log) {
    if (high / low < 1.001) [low, high] = [low / 1.5, high * 1.5];
    const margin = (high / low) ** 0.04;
    [low, high] = [low / margin, high * margin];
  } else {
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.1 || 0.5;
    [low, high] = [low >= 0 && low < margin ? 0 : low - margin, high + margin];
  }
  const box = { left: 54, right: width - 10, top: 8, bottom: height - 24 };
  const x = (value) => box.left + ((value - left) / (right - left)) * (box.right - box.left);
  const scale = STATE.log ? Math.log : (value) => value;
  const y = (value) => box.bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (box.bottom - box.top);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: "0" });
  drawing.setAttribute("aria-label", `${chart.spec.title}; arrow keys read the values`);
  for (const value of ticks(low, high, 5, STATE.log)) {
    svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }, drawing);
    svg("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end", class: "y" }, drawing, format(value, 3));
  }
  for (const value of ticks(left, right, Math.max(2, Math.floor(width / 90)), false)) {
    if (STATE.axis === "step" && !Number.isInteger(value)) continue;
    const anchor = x(value) > box.right - 16 ? "end" : "middle";
    svg("text", { x: x(value), y: height - 7, "text-anchor": anchor, class: "x" }, drawing, format(value, 5));
  }
  const clip = `clip-${chart.index}`;
  const clipped = svg("clipPath", { id: clip }, drawing);
  svg("rect", { x: box.left - 4, y: 0, width: box.right - box.left + 8, height: box.bottom + 4 }, clipped);
  const area = svg("g", { "clip-path": `url(#${clip})` }, drawing);
  // Where a run resumed or an alert was, of a page of one run.
  for (const [at, text] of DATA.runs.length === 1 ? DATA.runs[0].marks : []) {
    const place = x(DATA.runs[0][STATE.axis][at]);
    const mark = svg("path", { class: "mark", d: `M${place} ${box.top}V${box.bottom}` }, area);
    svg("title", {}, mark, text);
  }
  for (const curve of visible) {
    const style = `s${curve.colour % 8}${curve.colour > 7 ? " dashed" : ""}`;
    let path = "", pen = "M";
    for (const [px, py] of curve.points) {
      if (py === null) pen = "M";
      else {
        path += `${pen}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
        pen = "L";
      }
    }
    svg("path", { class: `curve ${curve.kind} ${style}`, d: path }, area);
    if (curve.kind === "dots")
      for (const [px, py] of curve.points)
        if (py !== null) svg("circle", { class: `dot ${style}`, cx: x(px), cy: y(py), r: 3 }, area);
    curve.points.forEach(([px, py], at) => {
      const error = curve.error?.[at];
      const low = STATE.log ? Math.max(py - error, py / 10) : py - error;
      if (error && py !== null) svg("path", { class: `curve ${style}`, d: `M${x(px)} ${y(low)}V${y(py + error)}` }, area);
    });
  }
  Object.assign(chart, { drawing, all, visible, box, x, y, left, right, width });
  figure.querySelector("svg")?.remove();
  chart.tip.hidden = true;
  figure.insertBefore(drawing, chart.legend);
  listen(chart);
}

function redraw() {
  document.getElementById("reset").hidden = !STATE.zoom;
  charts.forEach(draw);
}

function nearest(points, value) {
  let best = -1;
  points.forEach(([px, py], at) => {
    if (py !== null && (best < 0 || Math.abs(px - value) < Math.abs(points[best][0] - value))) best = at;
  });
  return best;
}

// Marks the point nearest to an x, and says each curve's value there, or at its own nearest point.
function point(chart, value) {
  const found = chart.visible.map((curve) => [curve, curve.points[nearest(curve.points, value)]]);
  const known = found.filter(([, at]) => at && at[0] >= chart.left && at[0] <= chart.right);
  leave(chart);
  if (!known.length) return;
  const here = known.reduce((a, b) => (Math.abs(b[1][0] - value) < Math.abs(a[1][0] - value) ? b : a))[1][0];
  chart.at = here;
  chart.mark = svg("g", {}, chart.drawing);
  const { box, x, y, tip } = chart;
  svg("line", { class: "cross", x1: x(here), x2: x(here), y1: box.top, y2: box.bottom }, chart.mark);
  tip.textContent = "";
  html("b", "", tip, `${DATA.axes.find(([key]) => key === STATE.axis)[1]} ${format(here, 7)}`);
  for (const [curve, at] of known) {
    const row = html("div", `s${curve.colour % 8}`, tip);
    html("span", "", row, curve.name + (at[0] === here ? "" : ` (at ${format(at[0], 7)})`));
    const error = curve.error?.[curve.points.indexOf(at)];
    html("b", "", row, format(at[1], 5) + (error ? ` \u00b1 ${format(error, 2)}` : ""));
    svg("circle", { class: `dot s${curve.colour % 8}`, cx: x(at[0]), cy: y(at[1]), r: 4 }, chart.mark);
  }
  tip.hidden = false;
  const side = x(here) > chart.width / 2 ? x(here) - tip.offsetWidth - 4 : x(here) + 24;
  tip.style.left = `${Math.max(4, side)}px`;
  tip.style.top = `${chart.drawing.getBoundingClientRect().top - chart.figure.getBoundingClientRect().top + 8}px`;
}

function leave(chart) {
  chart.mark?.remove();
  chart.tip.hidden = true;
}

function listen(chart) {
  const { drawing, box } = chart;
  const value = (event) => {
    const at = event.clientX - drawing.getBoundingClientRect().left;
    const share = (at - box.left) / (box.right - box.left);
    return chart.left + Math.min(1, Math.max(0, share)) * (chart.right - chart.left);
  };
  let start = null, brush = null;
  drawing.addEventListener("pointerdown", (event) => {
    start = value(event);
    if (event.pointerType === "mouse") drawing.setPointerCapture(event.pointerId);
  });
  drawing.addEventListener("pointermove", (event) => {
    const now = value(event);
    if (start !== null && Math.abs(chart.x(now) - chart.x(start)) > 5) {
      leave(chart);
      brush ||= svg("rect", { class: "brush", y: box.top, height: box.bottom - box.top }, drawing);
      brush.setAttribute("x", Math.min(chart.x(start), chart.x(now)));
      brush.setAttribute("width", Math.abs(chart.x(start) - chart.x(now)));
    } else point(chart, now);
  });
  drawing.addEventListener("pointerup", (event) => {
    const from = start, zoomed = brush;
    start = brush = null;
    zoomed?.remove();
    if (!zoomed) return;
    STATE.zoom = [Math.min(from, value(event)), Math.max(from, value(event))];
    remember();
    redraw();
  });
  drawing.addEventListener("pointercancel", () => {
    brush?.remove();
    start = brush = null;
  });
  drawing.addEventListener("pointerleave", () => leave(chart));
  drawing.addEventListener("dblclick", reset);
  drawing.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") return reset();
    if (!by || !chart.visible.length) return;
    event.preventDefault();
    const xs = chart.visible.flatMap((curve) => curve.points).filter(([x, y]) => y !== null && x >= chart.left && x <= chart.right);
    const places = [...new Set(xs.map((place) => place[0]))].sort((a, b) => a - b);
    const at = chart.at === undefined ? -1 : places.indexOf(chart.at);
    point(chart, places[Math.min(places.length - 1, Math.max(0, at + by))]);
  });
}

function reset() {
  STATE.zoom = null;
  remember();
  redraw();
}

// What is chosen is kept in the address, so that it outlives a refresh and can be sent.
function remember() {
  const chosen = new URLSearchParams({ axis: STATE.axis });
  if (STATE.log) chosen.set("log", "1");
  if (STATE.zoom) chosen.set("zoom", STATE.zoom.map((value) => value.toPrecision(7)).join(","));
  window.history.replaceState(null, "", "#" + chosen);
}

function recall() {
  const chosen = new URLSearchParams(location.hash.slice(1));
  if (DATA.axes.some(([key]) => key === chosen.get("axis"))) STATE.axis = chosen.get("axis");
  STATE.log = chosen.has("log");
  const zoom = (chosen.get("zoom") || "").split(",").map(Number);
  if (zoom.length === 2 && zoom[1] > zoom[0]) STATE.zoom = zoom;
}

function begin() {
  recall();
  const axis = document.getElementById("axis"), log = document.getElementById("log");
  for (const [key, label] of DATA.axes) {
    const option = html("option", "", axis, label);
    option.value = key;
  }
  axis.value = STATE.axis;
  log.checked = STATE.log;
  axis.addEventListener("change", () => {
    Object.assign(STATE, { axis: axis.value, zoom: null });
    remember();
    redraw();
  });
  log.addEventListener("change", () => {
    STATE.log = log.checked;
    remember();
    redraw();
  });
  document.getElementById("reset").addEventListener("click", reset);
  document.querySelectorAll("[data-chart]").forEach((figure, index) => {
    const spec = DATA.charts[figure.dataset.chart];
    const chart = { figure, spec, index, legend: html("div", "legend", figure), tip: html("div", "tip", figure) };
    chart.tip.hidden = true;
    for (const series of spec.series) {
      const button = html("button", `s${series.colour % 8}`, chart.legend, series.name);
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        const key = spec.title + "/" + series.name;
        if (!STATE.hidden.delete(key)) STATE.hidden.add(key);
        button.setAttribute("aria-pressed", String(!STATE.hidden.has(key)));
        draw(chart);
      });
    }
    charts.push(chart);
  });
  redraw();
  let last = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    if (window.innerWidth !== last) timer = setTimeout(redraw, 100);
    last = window.innerWidth;
  });
}

if (document.getElementById("axis")) begin();

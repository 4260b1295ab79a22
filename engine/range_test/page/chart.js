/* One chart as an SVG: axes, lines with bands, marks, and a read-out for pointer, finger and keyboard. */

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 66; // room for the numbers of the vertical axis, and its name
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

function svgNode(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

/** Class and dash of a run's line: six colours, then the same ones dashed. */
function look(number) {
  if (number < 0) return { class: "plain", dash: DASHES[(-1 - number) % DASHES.length] };
  return { class: `look${number % 6}`, dash: DASHES[Math.floor(number / 6) % DASHES.length] };
}

/**
 * Draws a chart into an element.
 *
 * chart: { label, x: {name, log}, y: {name, log, bounds: [low, high]}, lines, spans, marks, crosses, skips }
 * line:  { look, points: [{x, y, low, high}], dots: [[x, y]], thin: [[[x, y]]], best, knots, read: (point) => [line] }
 */
class Chart {
  constructor(element, speak) {
    this.element = element;
    this.speak = speak;
    this.chosen = null; // [line, point] of the read-out
    this.tip = element.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
    this.svg = null;
  }

  draw(chart, width) {
    const names = this._placed(chart, width);
    const top = 10 + 15 * names.rows;
    const height = Math.round(Math.max(260, Math.min(width * (width > 700 ? 0.4 : 0.64), 430))) + top;
    this.frame = { left: LEFT, right: width - 12, top, bottom: height - 40 };
    const { left, right, bottom } = this.frame;
    const xs = chart.lines.flatMap((line) => line.points.map((point) => point.x)).filter((x) => isFinite(x) && (!chart.x.log || x > 0));
    const [lowX, highX] = xs.length ? [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))] : [1, 10];
    this.x = scale(lowX, highX, left, right, chart.x.log);
    this.y = scale(...chart.y.bounds, bottom, top, chart.y.log);
    this.chart = chart;
    const focused = this.svg && document.activeElement === this.svg;
    const svg = svgNode(null, "svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-label": chart.label });
    if (this.svg) this.svg.replaceWith(svg);
    else this.element.prepend(svg);
    this.svg = svg;
    this._axes(height);
    const clip = `clip-${this.element.parentNode.dataset.chart}-${this.element.parentNode.dataset.panel}`.replace(/\W/g, "_");
    svgNode(svgNode(svg, "clipPath", { id: clip }), "rect", { x: left - 5, y: top - 5, width: right - left + 10, height: bottom - top + 5 });
    this.inner = svgNode(svg, "g", { "clip-path": `url(#${clip})` });
    this._spans(chart.spans || []);
    chart.lines.forEach((line) => this._line(line));
    this._crosses(chart.crosses || [], chart.skips || []);
    this._marks(names);
    this.pointer = svgNode(svg, "g", {});
    this._listen();
    if (!xs.length) svgNode(svg, "text", { x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, "nothing to draw");
    if (focused) svg.focus({ preventScroll: true });
    this.hide();
  }

  _axes(height) {
    const { left, right, top, bottom } = this.frame;
    for (const tick of this.x.ticks(Math.floor((right - left) / 54))) {
      const x = this.x.at(tick);
      svgNode(this.svg, "line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom });
      svgNode(this.svg, "text", { x, y: bottom + 16, "text-anchor": x > right - 14 ? "end" : "middle" }, short(tick));
    }
    for (const tick of this.y.ticks(Math.floor((bottom - top) / 40))) {
      const y = this.y.at(tick);
      svgNode(this.svg, "line", { class: "grid", x1: left, x2: right, y1: y, y2: y });
      svgNode(this.svg, "text", { x: left - 7, y: y + 4, "text-anchor": "end" }, short(tick));
    }
    svgNode(this.svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
    svgNode(this.svg, "line", { class: "axis", x1: left, x2: left, y1: top, y2: bottom });
    svgNode(this.svg, "text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, this.chart.x.name);
    const middle = (top + bottom) / 2;
    svgNode(this.svg, "text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, this.chart.y.name);
  }

  /** The part of a span that the chart shows, as pixels; null for none. */
  _part(axis, from, to) {
    const [low, high] = [Math.max(from, axis.low), Math.min(to, axis.high)];
    return high >= low ? [axis.at(low), axis.at(high)] : null;
  }

  _spans(spans) {
    const { left, right, top, bottom } = this.frame;
    for (const span of spans) {
      const part = this._part(span.vertical ? this.y : this.x, span.from, span.to);
      if (!part) continue;
      const [a, b] = [Math.min(...part), Math.max(...part)];
      const line = (at) => svgNode(this.inner, "line", span.vertical ? { class: "edge", x1: left, x2: right, y1: at, y2: at } : { class: "edge", x1: at, x2: at, y1: top, y2: bottom });
      if (span.vertical) svgNode(this.inner, "rect", { class: "span", x: left, y: a, width: right - left, height: b - a });
      else if (span.thin) {
        const bar = svgNode(this.inner, "line", { class: "probably", x1: a, x2: b, y1: bottom - 4, y2: bottom - 4 });
        svgNode(bar, "title", {}, span.label);
        continue;
      } else svgNode(this.inner, "rect", { class: "span", x: a, y: top, width: b - a, height: bottom - top });
      if (span.from >= (span.vertical ? this.y : this.x).low) line(part[0]);
      if (span.to <= (span.vertical ? this.y : this.x).high) line(part[1]);
      if (!span.vertical && b - a > 74) svgNode(this.svg, "text", { class: "edge-name", x: (a + b) / 2, y: bottom - 10, "text-anchor": "middle" }, span.label);
    }
  }

  _path(points) {
    let text = "", open = false;
    for (const [x, y] of points) {
      const drawn = isFinite(y) && isFinite(x) && !(this.x.log && x <= 0) && !(this.y.log && y <= 0);
      if (drawn) text += `${open ? "L" : "M"}${this.x.at(x).toFixed(1)} ${this.y.at(y).toFixed(1)}`;
      open = drawn;
    }
    return text;
  }

  _line(line) {
    const shape = look(line.look);
    const pairs = line.points.map((point) => [point.x, point.y]);
    const banded = line.points.filter((point) => point.count > 1);
    if (banded.length > 1) {
      const outline = [...banded.map((p) => [p.x, p.high]), ...banded.reverse().map((p) => [p.x, p.low])];
      svgNode(this.inner, "path", { class: `area ${shape.class}`, d: `${this._path(outline)}Z` });
    }
    for (const each of line.thin || []) svgNode(this.inner, "path", { class: `thin ${shape.class}`, d: this._path(each) });
    if (line.dots) svgNode(this.inner, "path", { class: `dots ${shape.class}`, d: this._dots(line.dots) });
    svgNode(this.inner, "path", { class: `line ${line.best ? "best " : ""}${shape.class}`, d: this._path(pairs), "stroke-dasharray": shape.dash, "data-line": line.label });
    if (line.knots || pairs.length === 1) svgNode(this.inner, "path", { class: `points ${shape.class}`, d: this._dots(pairs) });
  }

  _dots(points) {
    return points
      .filter(([x, y]) => typeof y === "number" && isFinite(y) && !(this.x.log && x <= 0) && !(this.y.log && y <= 0))
      .map(([x, y]) => `M${this.x.at(x).toFixed(1)} ${this.y.at(y).toFixed(1)}h0`)
      .join("");
  }

  _crosses(crosses, skips) {
    const { top, bottom } = this.frame;
    for (const { x, y, look: number, label } of crosses) {
      const [a, shape] = [this.x.at(x), look(number).class];
      // At the upper edge where no y is given: where the loss went is out of sight, more often than not.
      const b = y === undefined ? top + 9 : this.y.at(y);
      if (y === undefined) svgNode(this.inner, "line", { class: `end ${shape}`, x1: a, x2: a, y1: top, y2: bottom });
      const cross = svgNode(this.svg, "path", { class: `cross ${shape}`, d: `M${a - 5} ${b - 5}l10 10m0 -10l-10 10` });
      svgNode(cross, "title", {}, label);
    }
    for (const { x, look: number, label } of skips) {
      const tick = svgNode(this.inner, "path", { class: `skips ${look(number).class}`, d: `M${this.x.at(x) - 4} ${bottom}l4 -9l4 9z` });
      svgNode(tick, "title", {}, label);
    }
  }

  /** Marks with the row that their names stand in, so that no two overlap. */
  _placed(chart, width) {
    const xs = chart.lines.flatMap((line) => line.points.map((point) => point.x)).filter((x) => x > 0);
    const marks = (chart.marks || []).filter((mark) => xs.length && mark.lr);
    if (!marks.length) return { rows: 0, marks: [] };
    const axis = scale(xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b)), LEFT, width - 12, true);
    const ends = [];
    const placed = marks
      .filter((mark) => mark.lr >= axis.low * 0.999 && mark.lr <= axis.high * 1.001)
      .map((mark) => ({ ...mark, at: axis.at(mark.lr), wide: mark.rule.length * 6.7 + 8 }))
      .sort((a, b) => a.at - b.at)
      .map((mark) => {
        const start = Math.max(LEFT, Math.min(mark.at - mark.wide / 2, width - 12 - mark.wide));
        let row = ends.findIndex((end) => end < start);
        if (row < 0) row = ends.length;
        ends[row] = start + mark.wide;
        return { ...mark, row, middle: start + mark.wide / 2 };
      });
    return { rows: ends.length, marks: placed };
  }

  _marks({ rows, marks }) {
    for (const { rule, lr, why, at, row, middle } of marks) {
      const ours = rule === "redline";
      const y = 10 + 15 * (rows - row - 1);
      svgNode(this.svg, "line", { class: ours ? "mark ours" : "mark", x1: at, x2: at, y1: y + 5, y2: this.frame.bottom });
      const name = svgNode(this.svg, "text", { class: ours ? "ours-name" : "name", x: middle, y: y + 1, "text-anchor": "middle" }, rule);
      svgNode(name, "title", {}, `${rule}: ${short(lr)}. ${why}`);
    }
  }

  // -- the read-out ---------------------------------------------------------------------------------

  _listen() {
    const nearest = (event) => this._nearest(event);
    this.svg.addEventListener("pointermove", nearest);
    this.svg.addEventListener("pointerdown", nearest);
    // A finger that is lifted leaves the words standing; a tap elsewhere takes them away.
    this.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && document.activeElement !== this.svg && this.hide());
    this.svg.addEventListener("blur", () => this.hide());
    this.svg.addEventListener("keydown", (event) => this._key(event));
  }

  _nearest(event) {
    const box = this.svg.getBoundingClientRect();
    const ratio = this.svg.viewBox.baseVal.width / box.width;
    const [px, py] = [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
    let best = null, least = Infinity;
    this.chart.lines.forEach((line, i) =>
      line.points.forEach((point, k) => {
        if (!this._seen(point)) return;
        const far = Math.hypot(this.x.at(point.x) - px, (this._height(point.y) - py) * 0.6);
        if (far < least) [best, least] = [[i, k], far];
      })
    );
    if (best) this.show(...best, false);
  }

  _key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    const lines = this.chart.lines;
    if (event.key === "Escape") return this.hide();
    if (!lines.length || !(event.key in moves || event.key === "ArrowUp" || event.key === "ArrowDown")) return;
    event.preventDefault();
    let [line, point] = this.chosen || [0, -1];
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      line = (line + (event.key === "ArrowDown" ? 1 : lines.length - 1)) % lines.length;
      point = Math.max(0, point);
    } else point += moves[event.key];
    this.show(line, Math.max(0, Math.min(lines[line].points.length - 1, point)), true);
  }

  _seen(point) {
    return isFinite(point.x) && isFinite(point.y) && !(this.x.log && point.x <= 0) && !(this.y.log && point.y <= 0);
  }

  _height(y) {
    const at = this.y.at(y);
    return Math.max(this.frame.top, Math.min(this.frame.bottom, at));
  }

  show(lineIndex, pointIndex, aloud) {
    const line = this.chart.lines[lineIndex], point = line.points[pointIndex];
    if (!point) return;
    this.chosen = [lineIndex, pointIndex];
    const words = [line.label, ...line.read(point)];
    const x = Math.max(this.frame.left, Math.min(this.frame.right, this.chart.x.log && point.x <= 0 ? this.frame.left : this.x.at(point.x)));
    const y = this._seen(point) ? this._height(point.y) : this.frame.top;
    this.pointer.replaceChildren();
    svgNode(this.pointer, "line", { class: "cursor", x1: x, x2: x, y1: this.frame.top, y2: this.frame.bottom });
    svgNode(this.pointer, "circle", { class: `pin ${look(line.look).class}`, cx: x, cy: y, r: 5.5 });
    const [name, ...rest] = words;
    this.tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: name }), ...rest.flatMap((word, i) => (i ? [document.createElement("br"), word] : [word])));
    this.tip.hidden = false;
    const ratio = this.svg.getBoundingClientRect().width / this.svg.viewBox.baseVal.width;
    const room = this.element.clientWidth - this.tip.offsetWidth;
    const beside = x * ratio + 14 <= room ? x * ratio + 14 : x * ratio - 14 - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(room, beside))}px`;
    this.tip.style.top = `${Math.max(0, y * ratio - this.tip.offsetHeight - 10)}px`;
    if (aloud) this.speak(words.join(", "));
  }

  hide() {
    this.chosen = null;
    this.tip.hidden = true;
    if (this.pointer) this.pointer.replaceChildren();
  }
}

/* The page: which lines each chart has, and what slider, boxes and legends change. */

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const hidden = new Set(); // labels of what the reader has hidden
  const state = { beta: data.beta, raw: true, marks: true, whole: false, log: false };
  const finite = (values) => values.filter((value) => typeof value === "number" && isFinite(value));
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

  // -- lines -----------------------------------------------------------------------------------------

  /** Training losses against LR or update: smoothed, with the dots as measured. */
  function trainingLine(group, xsOf) {
    const smoothed = new Map(group.runs.map((run) => [run, smooth(run.losses, state.beta)]));
    const points = together(group.runs, xsOf, (run) => smoothed.get(run));
    const several = group.runs.length > 1;
    return {
      label: group.label,
      look: group.look,
      points,
      thin: several ? group.runs.map((run) => smoothed.get(run).map((y, k) => [xsOf(run)[k], y])) : [],
      dots: state.raw ? group.runs.flatMap((run) => run.losses.map((y, k) => [xsOf(run)[k], y])) : null,
      read: (point) => readTraining(group, point),
    };
  }

  function readTraining(group, point) {
    const run = group.runs.reduce((a, b) => (b.losses.length > a.losses.length ? b : a));
    const step = stepsOf(run)[point.index];
    const words = [`update ${step}`, `LR ${short(run.lrs[point.index])}`];
    if (group.runs.length === 1) words.push(`loss ${short(run.losses[point.index])}`);
    words.push(`smoothed ${short(point.y)}${range(point)}`);
    if (run.skipped.includes(step)) words.push("skipped: the loss scale was too high");
    return words;
  }

  const range = (point) => (point.count > 1 ? ` (${short(point.low)} to ${short(point.high)}, ${point.count} runs)` : "");

  function validationLine(group) {
    const points = together(group.runs, (run) => run.validation.map((each) => each[0]), (run) => run.validation.map((each) => each[1]));
    return { label: group.label, look: group.look, points, knots: points.length < 60, read: (p) => [`after ${p.x} updates`, `validation loss ${short(p.y)}${range(p)}`] };
  }

  function scheduleLine(group) {
    const run = group.runs.reduce((a, b) => (b.losses.length > a.losses.length ? b : a), group.runs[0]);
    const points = together([run], stepsOf, () => run.lrs);
    return { label: group.label, look: group.look, points, read: (p) => [`update ${p.x}`, `LR ${short(p.y)}`] };
  }

  // -- charts ----------------------------------------------------------------------------------------

  /** Low and high of the losses shown: a diverging end does not flatten the rest, unless all is asked for. */
  function lossBounds(lines, starts) {
    const shown = lines.flatMap((line) => finite(line.points.flatMap((p) => [p.low, p.high])));
    const dots = lines.flatMap((line) => finite((line.dots || []).map((dot) => dot[1])));
    const positive = (values) => (state.log ? values.filter((value) => value > 0) : values);
    const low = least(positive(state.whole ? [...shown, ...dots] : shown));
    const high = most(positive(state.whole ? [...shown, ...dots] : starts));
    if (!isFinite(low) || !isFinite(high)) return state.log ? [0.1, 1] : [0, 1];
    if (state.log) return [low / 1.15, Math.max(high, low) * 1.15];
    const room = 0.08 * (high - low || Math.abs(high) || 1);
    return [low >= 0 && low - room < 0 ? 0 : low - room, Math.max(high, low) + room];
  }

  const startsOf = (groups) => groups.flatMap((group) => group.runs.map((run) => most(finite(run.losses).slice(0, 5)))).filter(isFinite);
  const validationStarts = (groups) => groups.flatMap((group) => group.runs.map((run) => most(finite(run.validation.map((each) => each[1])).slice(0, 2)))).filter(isFinite);

  function crosses(groups, byStep, withY) {
    return groups.flatMap((group) => group.runs.filter((run) => run.diverged).map((run) => {
      const [step, lr] = run.diverged;
      return { x: byStep ? step : lr, y: withY ? lr : undefined, look: group.look, label: `${run.name} diverged at update ${step}, LR ${short(lr)}` };
    }));
  }

  function skips(groups, byStep) {
    return groups.flatMap((group) => group.runs.flatMap((run) => {
      const lrs = new Map(stepsOf(run).map((step, k) => [step, run.lrs[k]]));
      return run.skipped.filter((step) => byStep || lrs.has(step)).map((step) => ({ x: byStep ? step : lrs.get(step), look: group.look, label: `${run.name}: update ${step} was skipped` }));
    }));
  }

  function spans(vertical) {
    const answer = data.answer;
    if (!answer) return [];
    const all = [{ from: answer.low, to: answer.high, label: "suggested 1Cycle", vertical }];
    if (!vertical && answer.probably_low) all.push({ from: answer.probably_low, to: answer.probably_high, thin: true, label: "the maximum lies probably here" });
    return all;
  }

  function byRate(groups, panel) {
    const tests = groups.filter((group) => group.test);
    const lines = tests.map((group) => trainingLine(group, (run) => run.lrs));
    return {
      label: `Training loss against the learning rate, for ${tests.map((group) => group.label).join(", ")}. Arrow keys read the points.`,
      x: { name: "learning rate", log: true }, y: { name: "training loss", log: state.log, bounds: lossBounds(lines, startsOf(tests)) },
      lines, spans: panel ? [] : spans(false), marks: panel || !state.marks ? [] : data.marks, crosses: crosses(tests, false, false), skips: skips(tests, false),
    };
  }

  function byUpdate(groups, best) {
    const validated = groups.some((group) => group.runs.some((run) => run.validation.length));
    const lines = validated ? groups.map(validationLine) : groups.map((group) => trainingLine(group, stepsOf));
    if (best !== null && lines[best]) lines[best].best = true;
    const kind = validated ? "validation loss" : "training loss";
    const bounds = lossBounds(lines, validated ? validationStarts(groups) : startsOf(groups));
    return { label: `${kind} against updates. Arrow keys read the points.`, x: { name: "update", log: false }, y: { name: kind, log: state.log, bounds }, lines, crosses: crosses(groups, true, false), skips: skips(groups, true) };
  }

  function schedules(groups) {
    const lines = groups.map(scheduleLine);
    const lrs = lines.flatMap((line) => finite(line.points.map((point) => point.y))).filter((lr) => lr > 0);
    const bounds = lrs.length ? [least(lrs) / 1.3, most(lrs) * 1.3] : [0.1, 1];
    return { label: "Learning rate against updates. Arrow keys read the points.", x: { name: "update", log: false }, y: { name: "learning rate", log: true, bounds }, lines, spans: spans(true), crosses: crosses(groups, true, true) };
  }

  function byBatch() {
    const line = (label, key, number) => ({
      label, look: number, knots: true,
      points: data.batches.map((each, index) => ({ x: each.size, y: each[key], low: each[key], high: each[key], count: 1, index })),
      read: (p) => [`batch size ${p.x}`, `LR ${short(p.y)}`],
    });
    const lines = [line("maximum", "high", 0), line("minimum", "low", 1)].filter((each) => !hidden.has(each.label));
    const lrs = data.batches.flatMap((each) => [each.low, each.high]);
    return { label: "Suggested boundaries against batch size", x: { name: "batch size", log: true }, y: { name: "learning rate", log: true, bounds: lrs.length ? [least(lrs) / 1.5, most(lrs) * 1.5] : [0.1, 1] }, lines };
  }

  /** How far short trainings came, against their peak; what went far above its start is out of sight. */
  function bySearch() {
    const told = data.search.filter((each) => typeof each.came === "number");
    const points = told.map((each, index) => ({ x: each.lr, y: each.came, low: each.came, high: each.came, count: 1, index }));
    const lines = [{ label: "short trainings", look: 0, knots: true, points, read: (p) => [`peak LR ${short(p.x)}`, `loss ${short(p.y)} from the start`] }].filter((each) => !hidden.has(each.label));
    const low = least(points.map((p) => p.y));
    const high = Math.min(most(points.map((p) => p.y)), Math.abs(low) / 2);
    const room = 0.08 * (high - low || 1);
    const fallen = data.search.filter((each) => typeof each.came !== "number").map((each) => ({ x: each.lr, look: 0, label: `peak LR ${short(each.lr)} diverged` }));
    const ours = data.marks.filter((mark) => mark.rule === "redline");
    return {
      label: "How far the loss of short trainings came, against their peak. Arrow keys read the points.",
      x: { name: "peak learning rate", log: true }, y: { name: "loss, from the start", log: false, bounds: points.length ? [low - room, high + room] : [-1, 0] },
      lines, marks: ours, crosses: fallen,
    };
  }

  const seen = (groups) => groups.filter((group) => !hidden.has(group.label));
  const inPanel = (panel) => data.groups.filter((group) => group.panel === panel);
  const best = () => (data.winner === null || hidden.has(data.trials[data.winner].label) ? null : seen(data.trials).indexOf(data.trials[data.winner]));
  const kinds = {
    rate: { legend: () => inPanel("").filter((group) => group.test), make: () => byRate(seen(inPanel("")), false) },
    loss: { legend: () => inPanel(""), make: () => byUpdate(seen(inPanel("")), null) },
    schedule: { legend: () => inPanel(""), make: () => schedules(seen(inPanel(""))) },
    panel: { legend: (panel) => inPanel(panel), make: (panel) => byRate(seen(inPanel(panel)), true) },
    batch: { legend: () => [{ label: "maximum", look: 0 }, { label: "minimum", look: 1 }], make: byBatch },
    search: { legend: () => [{ label: "short trainings", look: 0 }], make: bySearch },
    trials: { legend: () => data.trials, make: () => byUpdate(seen(data.trials), best()) },
  };

  const speak = (words) => { get("spoken").textContent = words; };
  const figures = [...document.querySelectorAll("figure[data-chart]")].map((figure) => ({
    figure, kind: kinds[figure.dataset.chart], panel: figure.dataset.panel, chart: new Chart(figure.querySelector(".plot"), speak),
  }));

  /** Draws all charts; on paper, two of the small ones stand side by side. */
  function redraw(paper) {
    for (const { figure, kind, panel, chart } of figures) {
      const width = paper ? (figure.className === "half" ? 340 : 690) : Math.max(260, figure.clientWidth);
      chart.draw(kind.make(panel), width);
    }
    for (const button of document.querySelectorAll(".legend button")) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.label)));
    get("beta").textContent = state.beta.toFixed(2);
  }

  function legends() {
    for (const { figure, kind, panel } of figures) {
      for (const group of kind.legend(panel)) {
        const button = Object.assign(document.createElement("button"), { type: "button" });
        button.dataset.label = group.label;
        const shape = look(group.look);
        svgNode(svgNode(button, "svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }), "path", { class: `line ${shape.class}`, d: "M1 5H25", "stroke-dasharray": shape.dash });
        button.append(group.label);
        button.addEventListener("click", () => { hidden.has(group.label) ? hidden.delete(group.label) : hidden.add(group.label); redraw(); });
        figure.querySelector(".legend").append(button);
      }
    }
  }

  // -- what the reader does ----------------------------------------------------------------------------

  get("smoothing").value = state.beta;
  get("smoothing").addEventListener("input", (event) => { state.beta = Number(event.target.value); redraw(); });
  for (const name of ["raw", "marks", "whole", "log"]) {
    get(name).addEventListener("change", (event) => { state[name] = event.target.checked; redraw(); });
  }
  const losses = [...data.groups, ...data.trials].flatMap((group) => group.runs.flatMap((run) => finite(run.losses)));
  get("log-label").hidden = !losses.length || least(losses) <= 0;
  get("marks-label").hidden = !data.marks.some((mark) => mark.lr);
  get("controls").hidden = false;

  async function copied(text) {
    try {
      await navigator.clipboard.writeText(text);
      return "copied";
    } catch {
      getSelection().selectAllChildren(get("json")); // and the older way, where a page may not use the clipboard
      return document.execCommand("copy") ? "copied" : "selected: press Ctrl+C";
    }
  }
  if (get("copy")) {
    get("copy").hidden = false;
    get("copy").addEventListener("click", async () => { get("copied").textContent = await copied(get("json").textContent); });
  }

  legends();
  redraw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } }); // not for a phone's address bar
  addEventListener("beforeprint", () => redraw(true));
  addEventListener("afterprint", () => redraw());
})();

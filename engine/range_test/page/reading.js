"use strict";
/* Reading a record: smoothing as engine/range_test/smoothing.py does it, and runs of several seeds as one line. */

const MEMORY_SHARE = 0.05; // smoothing.MEMORY_SHARE

/** The median of the last three losses, then a bias-corrected moving average whose memory grows with the run. */
function smooth(losses, beta) {
  let filtered = NaN, smoothed = NaN, count = 0, weight = 0, seen = [];
  return losses.map((loss) => {
    if (typeof loss !== "number") return smoothed; // nan and inf come as strings
    seen = [...seen.slice(-2), loss];
    filtered = seen.length === 3 ? [...seen].sort((a, b) => a - b)[1] : seen[0];
    count += 1;
    const fresh = Math.min(1 - beta, 1 / (MEMORY_SHARE * count));
    if (count === 1 || count === 3) {
      smoothed = filtered;
      weight = fresh;
    } else {
      weight = (1 - fresh) * weight + fresh;
      smoothed += (fresh / weight) * (filtered - smoothed);
    }
    return smoothed;
  });
}

/** The update of each entry of a run. */
function stepsOf(run) {
  return run.steps || run.losses.map((_, index) => index * run.every);
}

/** One point for each entry: the mean over runs, and how far they lie apart. */
function together(runs, xsOf, ysOf) {
  const all = runs.map((run) => ({ xs: xsOf(run), ys: ysOf(run) }));
  const longest = all.reduce((a, b) => (b.xs.length > a.xs.length ? b : a), all[0]);
  return longest.xs.map((x, index) => {
    const ys = all.map((each) => each.ys[index]).filter((y) => typeof y === "number" && isFinite(y));
    const mean = ys.reduce((a, b) => a + b, 0) / ys.length;
    return { x, y: mean, low: Math.min(...ys), high: Math.max(...ys), count: ys.length, index };
  });
}

/** A number with four digits, as people write it. */
function short(value) {
  if (typeof value !== "number") return String(value);
  if (!isFinite(value)) return String(value).toLowerCase();
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

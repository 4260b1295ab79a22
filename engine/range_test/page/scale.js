/* Axes: where a value lies, and which values are written beside them. */

/** A scale from [low, high] to [from, to]; linear or logarithmic. */
function scale(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v;
  const [a, b] = [f(low), f(high)];
  const at = (value) => (b > a ? from + ((f(value) - a) / (b - a)) * (to - from) : (from + to) / 2);
  return { at, low, high, log, ticks: (room) => (log ? logTicks(low, high, room) : linearTicks(low, high, room)) };
}

function linearTicks(low, high, room) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, room);
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 2.5, 5, 10].find((each) => each * size >= rough * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, room) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const within = (each) => each >= low * 0.999 && each <= high * 1.001;
  for (const parts of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let k = first; k <= last; k += 1) for (const part of parts) ticks.push(Number((part * 10 ** k).toPrecision(6)));
    const seen = ticks.filter(within);
    if (seen.length >= 1 && (seen.length <= room || parts.length === 1)) {
      const every = Math.ceil(seen.length / Math.max(1, room)); // many decades: every second, third ...
      const kept = seen.filter((_, index) => index % every === 0);
      return kept.length > 1 ? kept : [low, high];
    }
  }
  return [low, high];
}

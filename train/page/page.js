"use strict";
/* Sliders: the line follows the pointer; the hidden range takes the keys. */
for (const box of document.querySelectorAll(".compare")) {
  const range = box.querySelector("input");
  const show = () => box.style.setProperty("--at", range.value + "%");
  const follow = (event) => {
    const frame = box.getBoundingClientRect();
    range.value = 100 * (event.clientX - frame.left) / frame.width;
    show();
  };
  range.step = "any";
  range.addEventListener("input", show);
  range.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, Home: -100, End: 100 }[event.key];
    if (!way) return;
    event.preventDefault();
    range.value = Number(range.value) + way;
    show();
  });
  box.addEventListener("pointerdown", (event) => {
    box.setPointerCapture(event.pointerId);
    range.focus({ preventScroll: true });
    follow(event);
  });
  box.addEventListener("mousedown", (event) => event.preventDefault()); /* it would take the focus from the range */
  box.addEventListener("pointermove", (event) => { if (box.hasPointerCapture(event.pointerId)) follow(event); });
  show();
}

/* Charts: what stands at the x nearest to the pointer; arrow keys go from one x to the next. */
const told = (value) => {
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};
const made = (tag, parent, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  parent.append(node);
  return node;
};
for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.dataset.chart), area = plot.querySelector(".area");
  const all = [...new Set(data.series.flatMap((s) => s.x.filter((x, n) => x !== null && s.y[n] !== null)))].sort((a, b) => a - b);
  let at = -1, parts = [];
  const hide = () => { parts.forEach((part) => part.remove()); parts = []; };
  const show = (index) => {
    hide();
    at = Math.max(0, Math.min(all.length - 1, index));
    const x = all[at], place = (x - data.x[0]) / (data.x[1] - data.x[0]);
    const cross = made("div", area, undefined, "cross"), tip = made("div", area, undefined, "tip");
    parts = [cross, tip];
    cross.style.left = 100 * place + "%";
    made("b", tip, data.unit + " " + told(x));
    for (const series of data.series) {
      const n = series.x.indexOf(x);
      if (n < 0 || series.y[n] === null) continue;
      const row = made("span", tip);
      row.style.setProperty("--c", `var(--c${series.c})`);
      made("em", row, series.name);
      const band = series.low && series.low[n] !== null && series.high[n] !== null;
      made("strong", row, told(series.y[n]) + (band ? ` (${told(series.low[n])} … ${told(series.high[n])})` : ""));
    }
    const room = area.clientWidth, wide = tip.offsetWidth, wanted = place * room + (place > .5 ? -wide - 12 : 12);
    tip.style.left = Math.max(Math.min(wanted, room - wide), -48) + "px";
  };
  const nearest = (event) => {
    const frame = area.getBoundingClientRect();
    const x = data.x[0] + (event.clientX - frame.left) / frame.width * (data.x[1] - data.x[0]);
    let best = 0;
    all.forEach((value, n) => { if (Math.abs(value - x) < Math.abs(all[best] - x)) best = n; });
    show(best);
  };
  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    show(at < 0 && way < 0 ? all.length - 1 : at + way);
  });
}

/* A page that renews itself says how old it is, and stays where its reader is. */
const renewed = document.querySelector('meta[http-equiv="refresh"]');
const written = document.querySelector("time[data-written]");
if (renewed && written) {
  const first = written.textContent, many = 20 * Number(renewed.content);
  const age = () => {
    const seconds = Math.max(0, Math.round(Date.now() / 1000 - written.dataset.written));
    const told = seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
    written.textContent = `${first}, ${told} ago`;
    written.classList.toggle("old", seconds > many);
    if (seconds > many) written.textContent += ": nothing new since, so it may have stopped";
  };
  age();
  setInterval(age, 1000);
}
if (renewed) {
  const name = "sharpprior" + location.pathname;
  const folds = () => [...document.querySelectorAll("details")];
  try {
    const kept = JSON.parse(sessionStorage.getItem(name) || "null");
    if (kept) {
      folds().forEach((fold, n) => { fold.open = Boolean(kept.open[n]); });
      scrollTo(0, kept.top);
    }
    addEventListener("pagehide", () => {
      sessionStorage.setItem(name, JSON.stringify({ top: scrollY, open: folds().map((fold) => fold.open) }));
    });
  } catch { /* a browser that keeps nothing for files: it begins at the top */ }
}

// The page of `llm report`: shows the values under the pointer in each chart.

// 4 significant digits; k, M, G, T for large numbers, a power of ten for tiny ones.
function format(value) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  const power = size < 1e4 ? 0 : Math.min(4, Math.floor(Math.log10(size) / 3));
  return Number((value / 1000 ** power).toPrecision(4)) + ["", "k", "M", "G", "T"][power];
}

// The index of the value nearest to x; xs never decrease.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const [left, right] = chart.box, [from, to] = chart.range;
  const lines = chart.lines.filter(line => line.x.length);
  if (!lines.length) continue;
  const { width, height } = svg.viewBox.baseVal;
  const place = x => left + (x - from) / (to - from) * (right - left);
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "line");
  mark.setAttribute("class", "mark");
  mark.setAttribute("y2", height);
  const box = document.createElement("div");
  box.className = "values";
  box.hidden = true;

  function show(event) {
    const area = svg.getBoundingClientRect();
    const pointed = from + ((event.clientX - area.left) / area.width * width - left) / (right - left) * (to - from);
    const all = lines.map(line => line.x[nearest(line.x, pointed)]);
    const x = all.reduce((best, one) => Math.abs(one - pointed) < Math.abs(best - pointed) ? one : best);
    const title = document.createElement("b");
    title.textContent = `${chart.x}: ${format(x)}`;
    box.replaceChildren(title);
    for (const line of lines) {
      const i = nearest(line.x, x);
      if (Math.abs(place(line.x[i]) - place(x)) > 3) continue;  // it has no point here
      const row = document.createElement("span"), key = document.createElement("i");
      key.className = `key c${line.color}`;
      row.append(key, `${line.name} ${format(line.y[i])}`.trim());
      box.append(row);
    }
    mark.setAttribute("x1", place(x));
    mark.setAttribute("x2", place(x));
    svg.append(mark);
    svg.after(box);
    box.hidden = false;
    // On the side of the mark where there is more space.
    const at = place(x) / width;
    box.style.left = at < 0.5 ? `${100 * at + 3}%` : "auto";
    box.style.right = at < 0.5 ? "auto" : `${100 * (1 - at) + 3}%`;
  }

  function hide() {
    box.hidden = true;
    mark.remove();
  }

  // Before show(), so that a tap elsewhere hides what a tap has shown.
  document.addEventListener("pointerdown", hide, true);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointercancel", hide);
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
}

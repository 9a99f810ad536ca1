// SPDX-License-Identifier: Apache-2.0
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip"), viewer = document.getElementById("viewer");
  const format = (v) => v === null || v === undefined ? "–" : String(Number(Number(v).toPrecision(3)));
  const show = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const cellAt = (event, box, rows, columns) => {
    const y = Math.floor((event.clientY - box.top) / box.height * rows);
    const x = Math.floor((event.clientX - box.left) / box.width * columns);
    return y >= 0 && x >= 0 && y < rows && x < columns ? [y, x] : null;
  };
  let open = null;

  const mapOf = (table, row, column) => {
    const site = table.sites[row], heads = data.heads[site] || 0;
    const group = table.columns && heads > table.columns ? heads / table.columns : 1;
    return [site, Math.floor(column * group), group];
  };
  const view = (table, row, column) => {
    const [site, head, group] = mapOf(table, row, column);
    const source = data.maps[site + "." + head];
    if (!source) return;
    viewer.hidden = false;
    viewer.querySelector("b").textContent = "Head " + table.layers[row] + "." + head;
    viewer.querySelector("p").textContent = (group > 1 ? "first of the " + group + " heads that share these keys; " : "") +
      "rows are queries, columns are keys; " + data.cell.join(" x ") + " tokens to a cell, colours logarithmic over four decades";
    const image = viewer.querySelector("img");
    image.src = source;
    image.alt = "attention map of head " + table.layers[row] + "." + head;
    open = image;
    viewer.querySelector(".where").textContent = "";
  };

  for (const image of document.querySelectorAll("image[data-map]")) {
    const table = data.tables[image.dataset.map];
    if (!table) continue;
    const rows = table.mean.length, columns = table.mean[0].length;
    image.addEventListener("mousemove", (event) => {
      const at = cellAt(event, image.getBoundingClientRect(), rows, columns);
      if (!at) return hide();
      const [y, x] = at, value = table.mean[y][x];
      const low = table.low && table.low[y][x], high = table.high && table.high[y][x];
      const range = low === null || low === undefined ? "" : " (" + format(low) + " to " + format(high) + ")";
      const rank = table.rank && table.rank[y][x] ? ", rank " + table.rank[y][x] + " of " + table.count : "";
      const name = table.names ? table.names[y] + ", channel " + x : table.layers[y] + "." + x;
      show(event, name + ": " + format(value) + range + rank);
    });
    image.addEventListener("mouseleave", hide);
    if (!table.names) image.addEventListener("click", (event) => {
      const at = cellAt(event, image.getBoundingClientRect(), rows, columns);
      if (at) view(table, at[0], at[1]);
    });
  }
  viewer.querySelector("button").addEventListener("click", () => { viewer.hidden = true; });
  viewer.querySelector("img").addEventListener("mousemove", (event) => {
    const image = viewer.querySelector("img"), n = image.naturalWidth, m = image.naturalHeight;
    const at = cellAt(event, image.getBoundingClientRect(), m, n);
    if (!at || !n) return;
    const piece = (i, side) => {
      const cell = data.cell[side], start = i * cell;
      const words = data.prompts.length ? data.prompts[0].tokens.slice(start, start + cell) : [];
      const text = words.join("").replace(/\n/g, "↵").slice(0, 40);
      return start + (cell > 1 ? "–" + (start + cell - 1) : "") + (text ? " “" + text + "”" : "");
    };
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d");
    context.drawImage(image, at[1], at[0], 1, 1, 0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    let best = -1, near = 1e9;
    data.colours.forEach((c, i) => {
      const d = (c[0] - r) ** 2 + (c[1] - g) ** 2 + (c[2] - b) ** 2;
      if (d < near) { near = d; best = i; }
    });
    const weight = a < 128 ? "no weight" : "≈ " + format(10 ** (-data.decades * (1 - (best + .5) / data.colours.length))) + " of its greatest";
    viewer.querySelector(".where").textContent = "query " + piece(at[0], 0) + " → key " + piece(at[1], 1) + ": " + weight;
  });

  const log = document.getElementById("log");
  if (log && document.querySelector("[data-form=log]")) {
    log.hidden = false;
    let on = false;
    log.addEventListener("click", () => {
      on = !on;
      for (const form of document.querySelectorAll("[data-form=log]")) {
        form.hidden = !on;
        form.previousElementSibling.hidden = on;
      }
      log.textContent = on ? "linear colours" : "logarithmic colours where they help";
    });
  }

  const tokenView = document.getElementById("token-view");
  if (!tokenView || !data.prompts.length) return;
  const series = document.getElementById("series"), prompt = document.getElementById("prompt");
  const option = (list, text, value) => {
    const made = document.createElement("option");
    made.textContent = text;
    made.value = value;
    list.append(made);
  };
  data.series.forEach((one, i) => option(series, one.label, i));
  data.prompts.forEach((one, i) => option(prompt, i + 1 + ": " + one.name, i));
  document.getElementById("tools").hidden = false;
  series.value = data.shown;
  const draw = () => {
    const words = data.prompts[prompt.value], chosen = data.series[series.value].rows[prompt.value];
    document.getElementById("shown").textContent = data.series[series.value].label;
    const peaks = new Set(chosen.peaks), [base, top] = chosen.ends;
    const strength = (v) => v === null || top <= base ? 0 : Math.round(16 * Math.max(-1, Math.min(1, (v - base) / (top - base))));
    tokenView.replaceChildren(...words.tokens.map((word, i) => {
      const made = document.createElement("i"), level = strength(chosen.values[i]);
      made.textContent = word;
      made.className = [level > 0 ? "p" + level : level < 0 ? "n" + -level : "", peaks.has(i) ? "peak" : "",
        words.roles[i] ? "role" : ""].filter(Boolean).join(" ");
      made.dataset.i = i;
      return made;
    }));
  };
  series.addEventListener("change", draw);
  prompt.addEventListener("change", draw);
  draw();
  tokenView.addEventListener("mousemove", (event) => {
    const i = event.target.dataset.i;
    if (i === undefined) return hide();
    const words = data.prompts[prompt.value], chosen = data.series[series.value].rows[prompt.value];
    show(event, "token " + i + (words.roles[i] ? ", " + words.roles[i] : "") + ": " + format(chosen.values[i]));
  });
  tokenView.addEventListener("mouseleave", hide);
})();

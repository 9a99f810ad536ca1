// SPDX-License-Identifier: Apache-2.0
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const value = (id, other) => by(id) ? by(id).value : other;
  const format = (v) => String(Number(Number(v).toPrecision(3)));
  const tip = by("tip"), canvas = document.createElement("canvas"), cards = [...document.querySelectorAll("[data-name]")];
  const steps = Object.keys(data.views[data.branches[0]].steps).map(Number).sort((a, b) => a - b);
  by("tools").hidden = false;
  by("tools").addEventListener("submit", (event) => event.preventDefault());

  const grid = () => {
    const view = data.views[value("branch", data.branches[0])], layer = value("layer", ""), step = Number(value("step", 0));
    if (step) return view.steps[steps[step - 1]];
    return layer === "" ? view.mean : view.layers[layer];
  };
  const levels = (one) => one.levels || (one.levels = Uint8Array.from(atob(one.data), (c) => c.charCodeAt(0)));
  const at = (one, i) => one.low + (one.high - one.low) * levels(one)[i] / 255;
  const endsOf = (one, name) => {
    const scale = by("scale").value;
    if (scale === "own") return [one.low, one.high];
    if (scale === "name") return [0, data.tops[name]];
    return [0, Math.max(...data.tops.filter((_, i) => data.units[i] === data.units[name]))];
  };
  const draw = () => {
    const shown = grid(), frame = Number(value("frame", 0)), clear = by("clear").checked;
    for (const card of cards) {
      const name = Number(card.dataset.name), one = shown && shown.maps[card.dataset.row][name];
      const heat = card.querySelector(".heat"), said = card.querySelector(".said"), ends = card.querySelectorAll(".ends span");
      heat.style.display = one ? "" : "none";
      if (!one) {
        said.textContent = "not seen here";
        ends.forEach((end) => { end.textContent = "–"; });
        continue;
      }
      const [low, high] = endsOf(one, name), size = shown.h * shown.w, count = data.colours.length;
      canvas.width = shown.w;
      canvas.height = shown.h;
      const context = canvas.getContext("2d"), image = context.createImageData(shown.w, shown.h);
      let best = 0, total = 0;
      for (let i = 0; i < size; i++) {
        const v = at(one, frame * size + i), part = high > low ? Math.min(1, Math.max(0, (v - low) / (high - low))) : 0;
        if (v > at(one, frame * size + best)) best = i;
        total += v;
        image.data.set([...data.colours[Math.min(count - 1, Math.floor(part * count))], clear ? Math.round(255 * part) : 255], 4 * i);
      }
      context.putImageData(image, 0, 0);
      heat.setAttribute("href", canvas.toDataURL());
      [low, (low + high) / 2, high].forEach((v, i) => { ends[i].textContent = format(v); });
      said.textContent = "greatest " + format(at(one, frame * size + best)) + " in row " + Math.floor(best / shown.w) + ", column " + best % shown.w +
        "; mean " + format(total / size);
      card.querySelector("svg").setAttribute("aria-label", "attention map of " + data.names[name] + ": " + said.textContent);
    }
    const step = Number(value("step", 0));
    if (by("step")) by("step-is").textContent = step ? String(steps[step - 1]) : "all";
    if (by("frame")) by("frame-is").textContent = frame + 1 + " of " + data.frames;
    by("opacity-is").textContent = by("opacity").value + " %";
    document.documentElement.style.setProperty("--shown", by("opacity").value / 100);
    document.body.classList.toggle("smooth", by("smooth").checked);
    data.pictures.forEach((frames, row) => {
      const near = data.frames > 1 ? Math.round(frame * (frames.length - 1) / (data.frames - 1)) : 0;
      by("picture" + row).setAttribute("href", frames[near]);
    });
  };
  for (const id of ["branch", "frame", "opacity", "scale", "clear", "smooth"]) if (by(id)) by(id).addEventListener("input", draw);
  if (by("layer")) by("layer").addEventListener("input", () => { if (by("step")) by("step").value = 0; draw(); });
  if (by("step")) by("step").addEventListener("input", () => { if (by("layer")) by("layer").value = ""; draw(); });

  for (const card of cards) {
    const heat = card.querySelector(".heat");
    heat.addEventListener("mousemove", (event) => {
      const shown = grid(), one = shown && shown.maps[card.dataset.row][card.dataset.name], box = heat.getBoundingClientRect();
      const y = Math.floor((event.clientY - box.top) / box.height * shown.h), x = Math.floor((event.clientX - box.left) / box.width * shown.w);
      if (!one || y < 0 || x < 0 || y >= shown.h || x >= shown.w) return;
      const v = at(one, (Number(value("frame", 0)) * shown.h + y) * shown.w + x);
      tip.textContent = data.names[card.dataset.name] + ": " + format(v) + " " + data.units[card.dataset.name] + ", row " + y + ", column " + x;
      tip.hidden = false;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
    });
    heat.addEventListener("mouseleave", () => { tip.hidden = true; });
  }
  draw();
})();

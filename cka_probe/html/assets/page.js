"use strict";
(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
  const data = JSON.parse($("#data").textContent);
  const root = document.documentElement;
  root.classList.add("js");

  // Light and dark: the reader's system decides until the button does.
  const theme = $("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  system.addEventListener("change", nameTheme);
  nameTheme();

  // The box beside what is pointed at or focused. It repeats the label that readers aloud hear.
  const tip = $("#tip");
  let shown = null;
  function show(element, [what, value, interval]) {
    hide();
    shown = element;
    element.classList.add("on");
    [what, value, interval || ""].forEach((text, k) => { tip.children[k].textContent = text; });
    tip.hidden = false;
    place();
  }
  function place() {
    const at = shown.getBoundingClientRect(), box = tip.getBoundingClientRect();
    const wanted = at.left + at.width / 2 - box.width / 2;
    const below = at.bottom + 10;
    tip.style.left = `${Math.max(4, Math.min(wanted, root.clientWidth - box.width - 4))}px`;
    tip.style.top = `${below + box.height < innerHeight ? below : at.top - box.height - 10}px`;
  }
  function hide() {
    if (shown) shown.classList.remove("on");
    shown = null;
    tip.hidden = true;
  }
  const follow = () => { if (shown && shown === document.activeElement) place(); else hide(); };
  addEventListener("scroll", follow, { capture: true, passive: true });
  addEventListener("resize", follow);
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const spoken = (lines) => `${lines[0]}: ${lines.slice(1).filter(Boolean).join(", ")}`;

  // Arrow keys among elements in rows and columns, one of which the Tab key reaches. Each carries
  // its place as `walk`; at(row, column) may be null. Returns what to call after some came or went.
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  function walk(container, at, rows, columns) {
    let current = null;
    function stand(element) {
      if (current) current.setAttribute("tabindex", "-1");
      current = element;
      if (current) current.setAttribute("tabindex", "0");
    }
    function settle() {
      if (current && at(...current.walk)) return;
      for (let k = 0; k < rows * columns; k++) {
        const element = at(Math.floor(k / columns), k % columns);
        if (element) return void stand(element);
      }
      stand(null);
    }
    container.addEventListener("focusin", (event) => { if (event.target.walk) stand(event.target); });
    container.addEventListener("keydown", (event) => {
      if (!event.target.walk || event.altKey || event.metaKey) return;
      let [r, c] = event.target.walk, step = steps[event.key];
      if (event.key === "Home") [r, c, step] = [event.ctrlKey ? 0 : r, -1, [0, 1]];
      if (event.key === "End") [r, c, step] = [event.ctrlKey ? rows - 1 : r, columns, [0, -1]];
      if (!step) return;
      event.preventDefault();
      const inside = () => r >= 0 && c >= 0 && r < rows && c < columns;
      do [r, c] = [r + step[0], c + step[1]]; while (inside() && !at(r, c));
      if (inside()) at(r, c).focus();
    });
    settle();
    return settle;
  }

  // Tables of coloured cells.
  function linesOf(cell, row, column) {
    const table = cell.closest("table"), value = cell.dataset.c;
    const what = describe(table, row, column);
    if (cell.className === "none") return [what, "one of the two views lacks this layer"];
    if (value === undefined) return [what, "nan: constant features", "or no variation above rounding"];
    if (table.id === "heatmap" && column === data.views[data.reference]) return [what, `CKA ${value}: the reference itself`];
    return [what, `CKA ${value}`, cell.dataset.i ? `${data.interval} ${cell.dataset.i}` : "no interval"];
  }
  function describe(table, row, column) {
    if (table.id === "heatmap") return `${row} in view ${column}`;
    return `${row} (${$("#of-rows").textContent}) and ${column} (${$("#of-columns").textContent})`;
  }
  function enliven(table) {
    const heads = $$("thead th", table);
    const rows = $$("tbody tr", table).map((row) => [$("th", row), $$("td", row)]);
    table.setAttribute("role", "grid");
    rows.forEach(([head, cells], r) => cells.forEach((cell, c) => {
      cell.walk = [r, c];
      cell.tabIndex = -1;
      cell.setAttribute("aria-label", spoken(linesOf(cell, head.dataset.n, heads[c].dataset.n)));
    }));
    let marked = [];
    const point = (cell) => {
      const [r, c] = cell.walk;
      unpoint();
      marked = [rows[r][0], heads[c]];
      marked.forEach((head) => head.classList.add("here"));
      show(cell, linesOf(cell, rows[r][0].dataset.n, heads[c].dataset.n));
    };
    const unpoint = () => {
      marked.forEach((head) => head.classList.remove("here"));
      hide();
    };
    table.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td");
      if (cell && cell.walk) point(cell); else unpoint();
    });
    table.addEventListener("pointerleave", unpoint);
    table.addEventListener("focusin", (event) => { if (event.target.walk) point(event.target); });
    table.addEventListener("focusout", unpoint);
    walk(table, (r, c) => rows[r][1][c] || null, rows.length, heads.length);
  }
  const heatmap = $("#heatmap");
  if (heatmap) enliven(heatmap);

  // The curve: its values are those of the heatmap.
  const plot = $(".plot");
  if (plot) {
    const layers = $$("tbody tr", heatmap);
    const columns = $$("thead th", heatmap).map((head) => head.dataset.n);
    const buttons = $$(".legend button");
    const lines = $$("g.s", plot).map((group, s) => {
      const dots = [];
      $$(".dot", group).forEach((dot) => {
        const k = Number(dot.dataset.k);
        dots[k] = dot;
        dot.walk = [s, k];
        dot.setAttribute("tabindex", "-1");
        dot.setAttribute("role", "img");
        dot.setAttribute("aria-label", spoken(read(dot)));
      });
      return { group, dots, off: false };
    });
    function read(dot) {
      const [s, k] = dot.walk, column = columns.indexOf(buttons[s].dataset.n);
      return linesOf($$("td", layers[k])[column], $("th", layers[k]).dataset.n, columns[column]);
    }
    const light = (s) => {
      plot.classList.toggle("busy", s !== null);
      lines.forEach((line, k) => line.group.classList.toggle("lit", k === s));
    };
    const point = (dot) => { light(dot.walk[0]); show(dot, read(dot)); };
    const unpoint = () => { light(null); hide(); };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const k = Math.floor((event.clientX - box.left) / box.width * layers.length);
      const near = lines.filter((line) => !line.off && line.dots[k]).map((line) => line.dots[k]);
      const away = (dot) => Math.abs(dot.getBoundingClientRect().top - event.clientY);
      if (near.length) point(near.reduce((a, b) => away(b) < away(a) ? b : a)); else unpoint();
    });
    plot.addEventListener("pointerleave", unpoint);
    plot.addEventListener("focusin", (event) => { if (event.target.walk) point(event.target); });
    plot.addEventListener("focusout", unpoint);
    const settle = walk(plot, (r, c) => lines[r].off ? null : lines[r].dots[c], lines.length, layers.length);
    buttons.forEach((button, s) => {
      button.addEventListener("click", () => {
        lines[s].off = button.getAttribute("aria-pressed") === "true";
        lines[s].group.classList.toggle("off", lines[s].off);
        button.setAttribute("aria-pressed", String(!lines[s].off));
        settle();
        unpoint();
      });
      button.addEventListener("pointerenter", () => { if (!lines[s].off) light(s); });
      button.addEventListener("pointerleave", unpoint);
    });
  }

  // The grid of two views, from the packed values of all pairs (see _pairs in page.py).
  const chosen = ["#rows", "#columns"].map((id) => $(id));
  const entries = data.views.map((_, v) => [...data.view.keys()].filter((e) => data.view[e] === v));
  const rank = new Map(entries[data.reference].map((entry, k) => [entry, k]));
  let packed = null;
  function unpack() {
    const bytes = Uint8Array.from(atob($("#pairs").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer));
  }
  function pair(raw, a, b) {
    const m = data.view.length, [i, j] = a < b ? [a, b] : [b, a], p = raw.length / 16;
    const k = data.kept === "all" ? i * m - i * (i - 1) / 2 + j - i : a * rank.size + rank.get(b);
    const field = (f) => {
      const byte = (n) => raw[(4 * f + n) * p + k] * 256 ** n;
      const value = byte(0) + byte(1) + byte(2) + byte(3);
      return value === 2 ** 32 - 1 ? NaN : value;
    };
    const zigzag = field(0), coarse = zigzag % 2 ? -(zigzag + 1) / 2 : zigzag / 2;
    const fine = 10 * coarse + field(1) - 5, below = field(2), above = below + field(3) - 1;
    return { coarse, fine, low: fine - below, high: fine + above };
  }
  function make(tag, parent, attributes = {}, text = "") {
    const element = parent.appendChild(document.createElement(tag));
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    if (text) element.textContent = text;
    return element;
  }
  function name(parent, scope, layer, most) {
    const letters = Array.from(layer), head = make("th", parent, { scope, "data-n": layer });
    const start = letters.slice(0, Math.floor((most - 1) / 2)).join("");
    const end = letters.slice(-Math.floor(most / 2)).join("");
    make("span", head, {}, letters.length > most ? `${start}…${end}` : layer);
  }
  function draw(raw) {
    const [a, b] = chosen.map((select) => Number(select.value));
    const [rows, columns] = [entries[a], entries[b]];
    const layer = (entry) => data.layers[data.layer[entry]];
    const numbered = columns.length <= data.numbered;
    $("#of-rows").textContent = data.views[a];
    $("#of-columns").textContent = data.views[b];
    const table = document.createElement("table");
    table.id = "grid";
    table.className = numbered ? "cells" : columns.length > data.tiny ? "cells small tiny" : "cells small";
    table.style.setProperty("--n", columns.length);
    table.setAttribute("aria-label", `CKA of each layer of view ${data.views[a]} with each of view ${data.views[b]}`);
    const top = make("tr", make("thead", table));
    make("td", top);
    columns.forEach((entry) => name(top, "col", layer(entry), numbered ? 14 : 24));
    const body = make("tbody", table);
    rows.forEach((i) => {
      const row = make("tr", body);
      name(row, "row", layer(i), 30);
      columns.forEach((j) => {
        const value = pair(raw, i, j), four = (x) => (x / 1e4).toFixed(4);
        if (Number.isNaN(value.fine)) return void make("td", row, { class: "nan" }, "nan");
        const shade = Math.round(Math.min(100, Math.max(0, value.fine / 100)));
        const cell = make("td", row, { class: `b${shade}`, "data-c": four(value.fine) });
        if (!Number.isNaN(value.low)) cell.dataset.i = `${four(value.low)} to ${four(value.high)}`;
        if (numbered) cell.textContent = (value.coarse / 1000).toFixed(3);
      });
    });
    $("#grid").replaceWith(table);
    enliven(table);
  }
  function redraw() {
    packed = packed || unpack();
    packed.then(draw, () => { $("#grid").textContent = "This browser cannot unpack the grid."; });
  }
  if (chosen[0]) {
    chosen.forEach((select) => select.addEventListener("change", redraw));
    if ($("#grid td")) enliven($("#grid")); else redraw();
  }

  // The table of numbers: a heading sorts (names in execution order), a filter hides rows.
  const order = (names) => { const at = new Map(names.map((n, k) => [n.trim(), k])); return (text) => at.get(text); };
  const heads = $$("#table thead th"), body = $("#table tbody");
  const keys = heads.map((head, k) => head.classList.contains("n") ? Number : order(k === 1 ? data.views : data.layers));
  const rows = $$("tr", body).map((row, k) => {
    const texts = [...row.cells].map((cell) => cell.textContent.trim());
    return { row, k, keys: keys.map((key, c) => key(texts[c])), words: texts.slice(0, -4).join(" ").toLowerCase() };
  });
  heads.forEach((head, c) => $("button", head).addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const missing = (entry) => Number.isNaN(entry.keys[c]);
    rows.sort((x, y) => missing(x) - missing(y) || (missing(x) ? 0 : (down ? -1 : 1) * (x.keys[c] - y.keys[c])) || x.k - y.k);
    body.append(...rows.map((entry) => entry.row));
  }));
  const filter = $("#filter");
  function sift() {
    const wanted = filter.value.toLowerCase().split(/\s+/);
    let left = 0;
    rows.forEach((entry) => {
      entry.row.hidden = !wanted.every((word) => entry.words.includes(word));
      left += !entry.row.hidden;
    });
    $("#count").textContent = left === rows.length ? `${left} rows` : `${left} of ${rows.length} rows`;
  }
  filter.addEventListener("input", sift);
  sift();
})();

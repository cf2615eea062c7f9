
"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);
const config = JSON.parse(document.getElementById("config").textContent);
const draw = (place) => vegaEmbed(place, { ...specs[+place.dataset.chart], config }, { actions: false, renderer: "svg" })
  .then(() => { place.dataset.drawn = "yes"; });
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "400px" });
document.querySelectorAll(".chart").forEach((place) => watcher.observe(place));

for (const choice of document.querySelectorAll(".choice")) {
  const select = choice.querySelector("select"), boards = choice.querySelectorAll(":scope > .board");
  if (select) select.addEventListener("change", () => boards.forEach((board, at) => { board.hidden = at !== +select.value; }));
}

function sortBy(table, column, descending) {
  const value = (row) => row.cells[column]?.dataset.value ?? row.cells[column]?.innerText.trim() ?? "";
  const body = table.tBodies[0], fixed = [...body.rows].filter((row) => row.classList.contains("untouched"));
  const rows = [...body.rows].filter((row) => !fixed.includes(row));
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)], [m, n] = [parseFloat(x), parseFloat(y)];
    if (isNaN(m) && isNaN(n)) return x.localeCompare(y) * (descending ? -1 : 1);
    if (isNaN(m) || isNaN(n)) return isNaN(m) ? 1 : -1;
    return descending ? n - m : m - n;
  };
  body.append(...fixed, ...rows.sort(compare));
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const descending = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}

const browser = document.querySelector(".browser");
if (browser) {
  const tasks = JSON.parse(document.getElementById("samples-data").textContent);
  const part = (name) => browser.querySelector(`[data-part="${name}"]`);
  const add = (parent, tag, text, kind) => {
    const made = parent.appendChild(document.createElement(tag));
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  let at = 0, chosen = null;  // the sample, and the cell whose kept tokens are drawn on its pictures
  const current = () => tasks[part("task").value];
  const veil = (box, [left, top, right, bottom], rows, columns, bits) => {
    const canvas = add(box, "canvas"), pen = canvas.getContext("2d"), bytes = atob(bits);
    const percent = (length) => `${100 * length}%`;
    Object.assign(canvas.style, {
      left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top),
    });
    [canvas.width, canvas.height] = [columns, rows];
    pen.fillStyle = "rgba(0, 0, 0, 0.78)";
    for (let token = 0; token < rows * columns; token++) {
      const kept = bytes.charCodeAt(token >> 3) >> (7 - token % 8) & 1;
      if (!kept) pen.fillRect(token % columns, Math.floor(token / columns), 1, 1);
    }
  };
  const draw = (sample, cell) => {
    const { cells } = current(), kept = cell === null ? null : sample.kept[cell];
    part("pictures").replaceChildren();
    for (const [picture, name, ...map] of kept?.panels ?? sample.pictures.map((_, number) => [number, ""])) {
      const figure = add(part("pictures"), "figure"), box = add(figure, "div"), image = add(box, "img");
      image.src = sample.pictures[picture];
      image.alt = `picture of document ${sample.doc_id}`;
      if (kept) veil(box, ...map);
      if (name && name !== "picture") add(figure, "figcaption", name);
    }
    part("kept").textContent = kept
      ? `${cells[cell].method} at ${cells[cell].retention ?? "a budget of its own"}, ${kept.stage}: ${kept.left} of ${kept.of} visual tokens left`
      : "";
  };
  const show = () => {
    const { cells, samples } = current();
    at = (at + samples.length) % samples.length;
    const sample = samples[at];
    part("count").textContent = `${at + 1} of ${samples.length}: document ${sample.doc_id} (${sample.why})`;
    part("question").textContent = sample.question;
    part("target").textContent = sample.target;
    const hidden = (sample.of || sample.pictures.length) - sample.pictures.length;
    part("more").textContent = hidden ? `${hidden} more pictures are not shown.` : "";
    const retentions = [...new Set(cells.map((cell) => cell.retention))], methods = [...new Set(cells.map((cell) => cell.method))];
    const table = part("answers"), head = add(add(table.replaceChildren() ?? table, "thead"), "tr"), body = add(table, "tbody");
    add(head, "th", "method");
    for (const retention of retentions) add(head, "th", retention ?? "own");
    for (const method of methods) {
      const row = add(body, "tr");
      add(row, "td", method === "none" ? "untouched" : method);
      for (const retention of retentions) {
        const cell = cells.findIndex((each) => each.method === method && each.retention === retention);
        const score = cell < 0 ? null : sample.scores[cell];
        const place = add(row, "td", cell < 0 ? "" : sample.answers[cell] ?? "–", score === null ? "" : score >= 0.5 ? "right" : "wrong");
        place.title = cell < 0 ? "" : sample.answers[cell] ?? "";
        if (!sample.kept[cell]) continue;
        const press = () => {
          chosen = chosen === cell ? null : cell;
          mark();
        };
        Object.assign(place, { tabIndex: 0, role: "button" });
        place.dataset.cell = cell;
        place.addEventListener("click", press);
        place.addEventListener("keydown", (event) => { if (event.key === "Enter") press(); });
      }
    }
    const mark = () => {
      for (const place of body.querySelectorAll("[data-cell]")) {
        const pressed = +place.dataset.cell === chosen;
        place.classList.toggle("shown", pressed);
        place.ariaPressed = pressed;
      }
      draw(sample, sample.kept[chosen] ? chosen : null);
    };
    mark();
  };
  const begin = () => {
    at = 0;
    const first = current().samples[0].kept.findIndex((each) => each);
    chosen = first < 0 ? null : first;
    show();
  };
  part("task").addEventListener("change", begin);
  part("back").addEventListener("click", () => { at -= 1; show(); });
  part("on").addEventListener("click", () => { at += 1; show(); });
  begin();
}

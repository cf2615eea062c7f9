
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
  let at = 0;
  const current = () => tasks[part("task").value];
  const overlay = (sample, cell) => part("pictures").querySelectorAll("figure").forEach((figure, number) => {
    figure.querySelector("canvas")?.remove();
    const map = sample.kept?.[cell]?.[number];
    if (!map) return;
    const canvas = add(figure, "canvas"), pen = canvas.getContext("2d");
    [canvas.width, canvas.height] = [map.columns * 8, map.rows * 8];
    map.share.forEach((share, token) => {
      pen.fillStyle = `rgba(0, 0, 0, ${0.75 * (1 - share)})`;
      pen.fillRect(token % map.columns * 8, Math.floor(token / map.columns) * 8, 8, 8);
    });
  });
  const show = () => {
    const { cells, samples } = current();
    at = (at + samples.length) % samples.length;
    const sample = samples[at];
    part("count").textContent = `${at + 1} of ${samples.length}: document ${sample.doc_id} (${sample.why})`;
    part("question").textContent = sample.question;
    part("target").textContent = sample.target;
    part("pictures").replaceChildren();
    for (const picture of sample.pictures) {
      const image = add(add(part("pictures"), "figure"), "img");
      image.src = picture;
      image.alt = `picture of document ${sample.doc_id}`;
    }
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
        if (sample.kept?.[cell]) place.addEventListener("click", () => {
          body.querySelector(".shown")?.classList.remove("shown");
          place.classList.add("shown");
          overlay(sample, cell);
        });
      }
    }
  };
  part("task").addEventListener("change", () => { at = 0; show(); });
  part("back").addEventListener("click", () => { at -= 1; show(); });
  part("on").addEventListener("click", () => { at += 1; show(); });
  show();
}

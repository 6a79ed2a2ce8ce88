// The page without its charts: the switch of colours, and tables that sort.
"use strict";

const root = document.documentElement;
const byId = (id) => document.getElementById(id);

/* The colours that a reader chose stay, where the browser keeps anything for files. */
function listenToTheme(redraw) {
  const inputs = [...byId("theme").querySelectorAll("input")];
  const chosen = root.dataset.theme ?? "auto";
  for (const input of inputs) {
    input.checked = input.value === chosen;
    input.addEventListener("change", () => {
      if (input.value === "auto") delete root.dataset.theme;
      else root.dataset.theme = input.value;
      try {
        localStorage.setItem("fullrank-theme", input.value);
      } catch { /* then it holds until the page is closed */ }
      redraw();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

/* Numbers sort as numbers and words as a reader of English expects; cells without a value are last, whichever the way. */
function compareCells(words, sign) {
  const collator = new Intl.Collator("en", { numeric: true });
  return (a, b) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return sign * (words ? collator.compare(a, b) : Number(a) - Number(b));
  };
}

function sortBy(table, column) {
  const headers = [...table.tHead.rows[0].cells];
  const ascending = headers[column].getAttribute("aria-sort") !== "ascending";
  headers.forEach((header, place) => {
    if (place === column) header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else header.removeAttribute("aria-sort");
  });
  const compare = compareCells(column === 0 || headers[column].classList.contains("words"), ascending ? 1 : -1);
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
  rows.sort((a, b) => compare(a[0], b[0]));
  body.append(...rows.map(([, row]) => row));
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, column));
    header.append(button);
  });
}

/* Paper is white, has no drawer to pull open, and the charts take its width. */
function listenToPrinting(draw) {
  let theme = root.dataset.theme;
  let closed = [];
  addEventListener("beforeprint", () => {
    theme = root.dataset.theme;
    root.dataset.theme = "light"; // the style sheet of print does not hold yet when the charts ask for their colours
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const each of closed) each.open = true;
    draw({ onPaper: true });
  });
  addEventListener("afterprint", () => {
    if (theme === undefined) delete root.dataset.theme;
    else root.dataset.theme = theme;
    for (const each of closed) each.open = false;
    draw({ onPaper: false });
  });
}

for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);

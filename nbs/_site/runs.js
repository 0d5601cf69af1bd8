// Sorts and filters the list of runs on the front page of a matrix.
const table = document.querySelector("table.runs"), rows = [...table.tBodies[0].rows];
const words = document.querySelector("#words"), state = document.querySelector("#state");
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
table.querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => {
  const heading = button.parentElement, sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  rows.sort((left, right) => {
    const a = value(left, column), b = value(right, column);
    return a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b);
  });
  table.tBodies[0].append(...rows);
}));
function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/);
  for (const row of rows)
    row.hidden = (state.value && row.dataset.state !== state.value)
      || !wanted.every(word => row.textContent.toLowerCase().includes(word));
  document.querySelector("#count").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
}
words.addEventListener("input", filter);
state.addEventListener("change", filter);
filter();

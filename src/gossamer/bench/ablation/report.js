// Sorts a table by the column whose heading is pressed: best first, then worst first.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), table = heading.closest("table"), body = table.tBodies[0];
    const down = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentNode.children)
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[heading.cellIndex].dataset.v ?? "";
    const order = (a, b) => Number(value(b)) - Number(value(a)) || value(a).localeCompare(value(b));
    const names = isNaN(Number(value(body.rows[0])));
    const compare = names ? (a, b) => value(a).localeCompare(value(b)) : order;
    body.append(...[...body.rows].sort((a, b) => (down ? 1 : -1) * compare(a, b)));
  });
}

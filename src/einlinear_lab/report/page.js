// A click on a heading sorts the table by that column; a second one turns the order round. Empty cells stay last.
document.querySelectorAll("table").forEach(table => {
  const headings = [...table.querySelectorAll("th")];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const key = row => {
      const { text, value } = row.cells[column].dataset;
      return text !== undefined ? text : value !== undefined ? Number(value) : null;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
    table.tBodies[0].append(...rows);
  }));
});

// The buttons above a figure choose what it shows.
document.querySelectorAll(".views").forEach(views => {
  const buttons = [...views.children];
  buttons.forEach(button => button.addEventListener("click", () => buttons.forEach(other => {
    const chosen = other === button;
    const panels = document.getElementById(other.getAttribute("aria-controls"));
    other.setAttribute("aria-pressed", chosen);
    panels.hidden = !chosen;
    if (chosen) panels.querySelectorAll(".js-plotly-plot").forEach(plot => Plotly.Plots.resize(plot));
  })));
});

// The first plots of a row were drawn before the others were there and took their place.
const plots = () => [...document.querySelectorAll(".js-plotly-plot")].filter(plot => plot.offsetParent);
addEventListener("load", () => plots().forEach(plot => Plotly.Plots.resize(plot)));

// Paper is narrower than most screens, and plots do not notice by themselves.
addEventListener("beforeprint", () => plots().forEach(plot => {
  const width = plot.closest(".panels") ? 335 : 690;
  Plotly.relayout(plot, { width, autosize: false });
}));
addEventListener("afterprint", () => plots().forEach(plot => Plotly.relayout(plot, { width: null, autosize: true })));

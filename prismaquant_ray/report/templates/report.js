"use strict";
(function () {
  document.documentElement.classList.add("js");
  const data = JSON.parse(document.getElementById("data").textContent);
  const byLetter = new Map(data.formats.map((format, column) => [format.letter, column]));
  const cells = [...document.querySelectorAll(".cell")];
  const number = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-5 ? value.toExponential(2) : value.toPrecision(3));
  // As many digits as the standard error leaves: two of it up to 35, else one.
  const withError = (value, error) => {
    if (!error) return number(value);
    const exponent = Math.floor(Math.log10(error));
    const decimals = (error / 10 ** exponent >= 3.55 ? 0 : 1) - exponent;
    const shown = (it) => (decimals > 7 ? it.toExponential(1) : it.toFixed(Math.max(0, decimals)));
    return shown(value) + " ± " + shown(error);
  };

  // The frontier: what a mark stands for.
  const marks = [...document.querySelectorAll(".mark")];
  const readout = document.getElementById("frontier-readout");
  const showMark = (mark) => {
    marks.forEach((other) => other.classList.toggle("on", other === mark));
    readout.textContent = mark.getAttribute("aria-label");
  };
  for (const mark of marks) {
    mark.addEventListener("click", () => showMark(mark));
    mark.addEventListener("focus", () => showMark(mark));
    mark.addEventListener("pointerenter", () => showMark(mark));
  }

  // The map: another target's plan, another colouring, and what a cell stands for.
  const target = document.getElementById("map-target");
  const colouring = document.getElementById("map-colour");
  const plan = () => data.plans[Number(target.value)];
  const costs = data.cost.map((column) => column.filter((value) => value > 0).sort((a, b) => a - b));
  let current = null;

  const level = (column, value) => {
    // Six steps of equal ratio between the first and the last percentile of all formats' costs together.
    const all = costs[column];
    if (value === null || !all.length) return "qx";
    const low = Math.log(all[Math.floor(0.02 * (all.length - 1))]), high = Math.log(all[Math.ceil(0.98 * (all.length - 1))]);
    const share = high > low ? (Math.log(Math.max(value, 1e-30)) - low) / (high - low) : 0;
    return "q" + Math.min(5, Math.max(0, Math.floor(6 * share)));
  };
  const describe = (cell) => {
    const row = Number(cell.dataset.g), column = byLetter.get(plan().choice[row]);
    const prices = data.formats.filter((format) => format.coded).map((format) => {
      const at = data.formats.indexOf(format), value = data.cost[at][row], error = data.error[at][row];
      if (value === null) return format.name + " not possible";
      return format.name + " " + withError(value, error);
    });
    return data.groups[row] + ": " + data.formats[column].name + ", " +
      data.parameters[row].toLocaleString("en") + " parameters, " + data.bytes[column][row].toLocaleString("en") +
      " bytes. Predicted loss, nats per token: " + prices.join(", ");
  };
  const paint = () => {
    const choice = plan().choice, column = Number(colouring.value);
    for (const cell of cells) {
      const row = Number(cell.dataset.g), letter = choice[row], format = data.formats[byLetter.get(letter)];
      const colour = column < 0 ? "f-" + format.name : level(column, data.cost[column][row]);
      cell.className = "cell " + colour + (cell === current ? " on" : "");
      cell.textContent = letter;
      cell.setAttribute("aria-label", data.groups[row] + ": " + format.name);
    }
    document.getElementById("map-summary").textContent = plan().text;
    document.getElementById("heat-legend").hidden = column < 0;
    if (current) document.getElementById("map-readout").textContent = describe(current);
  };
  const showCell = (cell) => {
    if (current) current.classList.remove("on");
    current = cell;
    cell.classList.add("on");
    document.getElementById("map-readout").textContent = describe(cell);
  };
  target.value = String(data.budget);
  colouring.value = "-1";
  target.addEventListener("change", paint);
  colouring.addEventListener("change", paint);
  for (const cell of cells) {
    cell.addEventListener("click", () => showCell(cell));
    cell.addEventListener("focus", () => showCell(cell));
    cell.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && showCell(cell));
  }
  // One stop for the Tab key; arrows move inside a table.
  for (const table of document.querySelectorAll(".map table")) {
    const first = table.querySelector(".cell");
    if (first) first.tabIndex = 0;
    table.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const at = event.target.closest("td");
      if (!step || !at) return;
      event.preventDefault();
      let row = at.parentElement.rowIndex, column = at.cellIndex, next = null;
      while (!next) {
        row += step[0];
        column += step[1];
        const box = table.rows[row] && table.rows[row].cells[column];
        if (!box || box.tagName !== "TD") return;
        next = box.querySelector(".cell");
      }
      next.focus();
    });
  }

  // Tables sort by a click on a title.
  for (const table of document.querySelectorAll("table.sortable")) {
    const titles = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    titles.forEach((title, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...title.childNodes);
      title.append(button);
      button.addEventListener("click", () => {
        const down = title.getAttribute("aria-sort") === "ascending";
        titles.forEach((other) => other.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const cell = row.cells[column], value = cell.dataset.v;
          return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value);
        };
        const rows = [...body.rows].map((row) => [key(row), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
          return down ? -order : order;
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  }
})();

// Says which classes a cell of a large confusion matrix is of.
for (const holder of document.querySelectorAll(".cells")) {
  const id = holder.id.replace("-cells", "");
  const data = JSON.parse(document.getElementById(id + "-data").textContent);
  const field = holder.querySelector(".field"), mark = holder.querySelector(".mark");
  const readout = document.getElementById(id + "-readout");
  const size = data.names.length, counts = new Map();
  data.rows.forEach((row, k) => counts.set(row * size + data.columns[k], data.counts[k]));
  const place = (at, length) => Math.min(size - 1, Math.max(0, Math.floor(at / length * size)));
  const short = (name) => name.length > 50 ? name.slice(0, 49) + "…" : name;
  const tell = (event) => {
    const box = field.getBoundingClientRect();
    const row = place(event.clientY - box.top - field.clientTop, field.clientHeight);
    const column = place(event.clientX - box.left - field.clientLeft, field.clientWidth);
    const count = counts.get(row * size + column) || 0, of = data.support[row];
    const share = of ? " (" + (100 * count / of).toFixed(1) + " %)" : "";
    readout.textContent = short(data.names[row]) + " → " + short(data.names[column]) + ": "
      + count.toLocaleString("en") + " of " + of.toLocaleString("en") + share;
    mark.hidden = false;
    mark.style.left = 100 * column / size + "%";
    mark.style.top = 100 * row / size + "%";
  };
  field.addEventListener("pointermove", tell);
  field.addEventListener("pointerdown", tell);
}

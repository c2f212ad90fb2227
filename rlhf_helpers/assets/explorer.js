// Draws the sliders, lists and picture that Python shows, and sends every move back. What a move means is in
// lab/explorers/form.py.
const HIDDEN = "position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%)";

// Words make a list, numbers a slider.
function isList(control) {
  return typeof control.values[0] === "string";
}

function addInput(parent, control) {
  const label = add(parent, "label", "display: flex; flex-wrap: wrap; gap: 8px; align-items: center");
  add(label, "span", "flex: 0 1 18em").textContent = control.label;
  const input = add(label, isList(control) ? "select" : "input", "flex: 0 1 16em; margin: 4px");
  keepKeys(input);
  if (isList(control)) {
    control.values.forEach((option, index) => {
      const choice = add(input, "option");
      choice.value = index;
      choice.textContent = option;
    });
  } else {
    input.type = "range";
    input.min = 0;
    input.max = control.values.length - 1;
  }
  return input;
}

function render({ model, el }) {
  const root = openForm(el, "rlhf-explorer", model.get("shown").title);

  const rows = model.get("shown").controls.map((control) => {
    const row = add(root, "div", "display: flex; flex-wrap: wrap; gap: 8px; align-items: center");
    const input = addInput(row, control);
    const value = add(row, "span");
    value.setAttribute("aria-hidden", "true"); // a screen reader takes the value from the slider
    input.addEventListener("input", move);
    return { input, value };
  });
  const image = add(root, "img", "display: block; max-width: 100%; height: auto");
  const message = add(root, "p", HIDDEN);
  message.setAttribute("role", "status");

  // One move is on its way at a time: a slider that is dragged waits for its picture and then asks for the
  // newest position, so no queue of old pictures builds up.
  const positions = () => rows.map(({ input }) => Number(input.value));
  let waiting = false;
  let moved = false;
  function move() {
    label();
    moved = waiting;
    if (waiting) return;
    waiting = true;
    model.send({ indices: positions() });
  }

  function label() {
    rows.forEach(({ input, value }, row) => {
      const control = model.get("shown").controls[row];
      if (isList(control)) return;
      value.textContent = control.values[input.value];
      input.setAttribute("aria-valuetext", value.textContent);
    });
  }

  async function draw() {
    const shown = model.get("shown");
    waiting = false;
    if (moved && String(positions()) !== String(shown.indices)) {
      move();
    } else {
      rows.forEach(({ input }, row) => (input.value = shown.indices[row]));
      label();
    }
    // The old picture stays until the new one is ready: nothing flickers.
    const page = new DOMParser().parseFromString(shown.picture, "text/html");
    const next = page.querySelector("img");
    const drawn = new Image();
    drawn.src = next.src;
    await drawn.decode().catch(() => {});
    image.src = next.src;
    image.alt = next.alt;
    image.width = next.width;
    message.textContent = shown.message;
  }

  draw();
  model.on("change:shown", draw);
  return () => model.off("change:shown", draw);
}

export default { render };

// Draws the pair that Python shows and sends each choice back. Logic and storage are in lab/widgets.py.
const BUTTONS = { a: "A is better", b: "B is better", tie: "no difference" };
const BOX =
  "flex: 1 1 16em; border: 1px solid #767676; border-radius: 4px; padding: 6px; white-space: pre-wrap";

function add(parent, tag, style = "") {
  const node = document.createElement(tag);
  node.style.cssText = style;
  parent.append(node);
  return node;
}

// JupyterLab looks for this attribute from the focused element upward, and reads a key as a command of the
// notebook ("a" inserts a cell, "dd" deletes one) if the element matches first. So it stands on the root
// and on everything that can have the focus.
function keepKeys(node) {
  node.setAttribute("data-lm-suppress-shortcuts", "true");
}

function render({ model, el }) {
  const root = add(el, "div");
  keepKeys(root);
  root.className = "rlhf-rater";
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Comparison of two answers");

  // A live region must stay in the page, so that a screen reader reads out what changes inside it.
  const status = add(root, "p");
  status.setAttribute("role", "status");
  const progress = add(status, "span");
  const prompt = add(status, "b", "white-space: pre-wrap");

  const answers = add(root, "div", "display: flex; flex-wrap: wrap; gap: 8px");
  const texts = {};
  for (const side of ["a", "b"]) {
    const box = add(answers, "div", BOX);
    add(box, "b", "display: block").textContent = side.toUpperCase();
    texts[side] = add(box, "span");
  }

  const row = add(root, "div", "display: flex; flex-wrap: wrap; gap: 8px; margin-top: 8px");
  const buttons = Object.entries(BUTTONS).map(([choice, label]) => {
    const button = add(row, "button", "width: auto");
    button.type = "button";
    button.className = "jupyter-button";
    button.textContent = label;
    keepKeys(button);
    // The index lets Python drop a second click on a pair that is rated already.
    button.addEventListener("click", () => model.send({ choice, index: model.get("shown").index }));
    return button;
  });

  // Only texts change: the button that was clicked stays in the page and keeps the focus.
  function draw() {
    const shown = model.get("shown");
    const done = shown.index >= shown.total;
    progress.textContent = done
      ? "All pairs are rated. Thank you!"
      : `Pair ${shown.index + 1} of ${shown.total}. `;
    prompt.textContent = shown.prompt;
    texts.a.textContent = shown.a;
    texts.b.textContent = shown.b;
    answers.style.display = done ? "none" : "flex";
    for (const button of buttons) {
      button.setAttribute("aria-disabled", String(done));
      button.style.opacity = done ? "0.5" : "1";
    }
  }

  draw();
  model.on("change:shown", draw);
  return () => model.off("change:shown", draw);
}

export default { render };

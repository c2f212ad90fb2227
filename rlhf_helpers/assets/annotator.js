// Draws the item that Python shows and sends each key back. Logic and storage are in lab/labeling.
const LETTERS = "ABCDEFGH";
const LABELS = {
  pair: { a: "A is better (A)", b: "B is better (B)", t: "Tie (T)", s: "Skip (S)" },
  ranking: { s: "Skip (S)" },
  rating: { s: "Skip (S)" },
};

function addText(parent, tag, className = "", text = "") {
  const node = add(parent, tag);
  node.className = className;
  node.textContent = text; // never innerHTML: the text is a model's
  return node;
}

function labelOf(shown, key) {
  const known = (LABELS[shown.task] || {})[key];
  if (known) return known;
  return shown.task === "ranking" ? `Next best: ${LETTERS[key - 1]} (${key})` : `${key} of 5 points (${key})`;
}

function render({ model, el }) {
  const root = addText(el, "div", "rlhf-annotator");
  root.tabIndex = 0; // a click on a text puts the focus here, so that keys stay in the form
  keepKeys(root);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Labeling form");

  const guideline = addText(root, "p", "guideline");
  // A live region must stay in the page, so that a screen reader reads out what changes inside it.
  const status = addText(root, "p");
  status.setAttribute("role", "status");
  const progress = addText(status, "span");
  const prompt = addText(status, "span", "prompt");
  const answers = addText(root, "div", "answers");
  const buttons = addText(root, "div", "buttons");
  const undo = addText(root, "button", "jupyter-button", "Undo (U)");
  undo.type = "button";
  keepKeys(undo);
  undo.addEventListener("click", () => press("u"));
  const report = addText(root, "ul", "report");
  report.setAttribute("aria-label", "Your labels so far");

  // The index lets Python drop a second key for an item that is labeled already.
  function press(key) {
    model.send({ key, index: model.get("shown").index });
  }

  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (key === "u" || (model.get("shown").keys || []).includes(key)) {
      event.preventDefault();
      press(key);
    }
    // Tab moves on and Enter presses a button; nothing else may reach the notebook.
    if (key !== "tab") event.stopPropagation();
  });

  // A button that stays in the page keeps the focus: buttons are made anew only for another set of keys.
  function drawButtons(shown) {
    const keys = shown.keys || [];
    if (buttons.dataset.keys === String(keys) + shown.task) return;
    buttons.dataset.keys = String(keys) + shown.task;
    const focused = buttons.contains(document.activeElement);
    buttons.replaceChildren();
    for (const key of keys) {
      const button = addText(buttons, "button", "jupyter-button", labelOf(shown, key));
      button.type = "button";
      keepKeys(button);
      button.addEventListener("click", () => press(key));
    }
    if (focused) root.focus();
  }

  function draw() {
    const shown = model.get("shown");
    const done = shown.index >= shown.total;
    guideline.textContent = shown.guideline;
    guideline.hidden = !shown.guideline;
    progress.textContent = done ? "All items are labeled. Thank you!" : `Item ${shown.index + 1} of ${shown.total}. `;
    prompt.textContent = done ? "" : shown.prompt;
    answers.replaceChildren();
    for (const [place, text] of (shown.answers || []).entries()) {
      const box = addText(answers, "div", "answer");
      const rank = (shown.ranked || []).indexOf(place);
      addText(box, "b", "", LETTERS[place] + (rank < 0 ? "" : ` (rank ${rank + 1})`));
      addText(box, "span", "", text);
    }
    drawButtons(shown);
    report.replaceChildren(...shown.report.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
  }

  draw();
  model.on("change:shown", draw);
  return () => model.off("change:shown", draw);
}

export default { render };

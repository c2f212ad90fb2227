// Draws the buttons that Python shows and sends each click back. What a click means is in lab/quizzes.py and
// lab/progress.py.
function render({ model, el }) {
  const root = openForm(el, "rlhf-choices", model.get("shown").title);

  const list = add(root, "div", "display: flex; flex-direction: column; gap: 6px");
  const buttons = model.get("shown").labels.map((label, index) => {
    const button = add(
      list,
      "button",
      "width: auto; height: auto; text-align: left; white-space: normal; padding: 4px 8px; line-height: 1.4"
    );
    button.type = "button";
    button.className = "jupyter-button";
    keepKeys(button);
    button.addEventListener("click", () => model.send({ index }));
    return button;
  });

  // A live region must stay in the page, so that a screen reader reads out what changes inside it.
  const message = add(root, "p");
  message.setAttribute("role", "status");

  // Only texts change: the button that was clicked stays in the page and keeps the focus.
  function draw() {
    const shown = model.get("shown");
    buttons.forEach((button, index) => {
      button.textContent = `${shown.marks[index]} ${shown.labels[index]}`;
    });
    message.textContent = shown.message;
  }

  draw();
  model.on("change:shown", draw);
  return () => model.off("change:shown", draw);
}

export default { render };

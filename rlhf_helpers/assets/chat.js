// Draws a chat with several policies, and sends messages, thumbs and choices back. What they mean is in
// lab/chat.py.
const ROW = "display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-end";
const BOX = "flex: 1 1 12em; border: 1px solid #767676; border-radius: 4px; padding: 6px";
const TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0";

function addButton(parent, text, press) {
  const button = add(parent, "button", "width: auto; height: auto; padding: 4px 8px; margin: 0 4px 0 0");
  button.type = "button";
  button.className = "jupyter-button";
  button.textContent = text;
  keepKeys(button);
  button.addEventListener("click", press);
  return button;
}

function render({ model, el }) {
  const root = openForm(el, "rlhf-chat", model.get("shown").title);
  const log = add(root, "div");
  log.setAttribute("role", "log"); // a screen reader reads out what is added
  log.setAttribute("aria-label", "Conversation");
  const choices = add(root, "div", ROW);
  for (const [text, choice] of [["A is better", 0], ["B is better", 1], ["Tie", "tie"]]) {
    addButton(choices, text, () => {
      input.focus(); // the choices disappear
      model.send({ choice });
    });
  }
  // A live region must stay in the page, so that a screen reader reads out what changes inside it.
  const status = add(root, "p");
  status.setAttribute("role", "status");

  const form = add(root, "div", ROW);
  const label = add(form, "label", "flex: 1 1 16em");
  add(label, "span").textContent = "Your message";
  const input = add(label, "input", "width: 100%; box-sizing: border-box; padding: 6px; font: inherit");
  input.autocomplete = "off";
  keepKeys(input);
  addButton(form, "Send", send);
  addButton(form, "New conversation", () => model.send({ restart: true }));
  // Not by a <form>: JupyterLab lets no submit event through.
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) send();
  });
  let waiting = false;
  function send() {
    if (waiting || !input.value.trim()) return;
    waiting = true;
    status.textContent = "Waiting for the answers.";
    model.send({ send: input.value });
  }

  let rows = []; // of each turn, the buttons of each answer
  function addTurn(turn, number) {
    const node = add(log, "div", "margin: 8px 0");
    add(node, "p", `${TEXT}; font-weight: bold`).textContent = `You: ${turn.message}`;
    const answers = add(node, "div", ROW.replace("flex-end", "stretch"));
    return turn.answers.map((answer, place) => {
      const box = add(answers, "div", BOX);
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", answer.label);
      add(box, "b").textContent = answer.label;
      add(box, "p", TEXT).textContent = answer.text; // never innerHTML: the text is a model's
      return [true, false].map((thumb) => addButton(box, "", () => model.send({ thumb, turn: number, place })));
    });
  }

  // Only what is new is added, so a button that was pressed keeps the focus.
  function draw() {
    const shown = model.get("shown");
    waiting = false;
    if (shown.turns.length < rows.length) {
      rows = [];
      log.replaceChildren();
    }
    if (shown.turns.length > rows.length) input.value = "";
    for (const turn of shown.turns.slice(rows.length)) rows.push(addTurn(turn, rows.length));
    shown.turns.forEach((turn, number) =>
      turn.answers.forEach((answer, place) =>
        rows[number][place].forEach((button, index) => {
          const pressed = answer.thumb === (index === 0);
          button.setAttribute("aria-pressed", pressed);
          button.textContent = (pressed ? "✓ " : "") + ["Thumb up", "Thumb down"][index];
        })
      )
    );
    choices.style.display = shown.due ? "flex" : "none";
    status.textContent = shown.message;
  }

  draw();
  model.on("change:shown", draw);
  return () => model.off("change:shown", draw);
}

export default { render };

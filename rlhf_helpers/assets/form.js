// What the scripts of all forms begin with (lab/widgets.py puts it in front of them).
function add(parent, tag, style = "") {
  const node = document.createElement(tag);
  node.style.cssText = style;
  parent.append(node);
  return node;
}

// JupyterLab looks for this attribute from the focused element upward, and reads a key as a command of the
// notebook ("a" inserts a cell, "dd" deletes one, an arrow leaves the cell) if the element matches first. So it
// stands on the root and on everything that can have the focus.
function keepKeys(node) {
  node.setAttribute("data-lm-suppress-shortcuts", "true");
}

// The root of a form, under its title.
function openForm(el, className, title) {
  const root = add(el, "div");
  keepKeys(root);
  root.className = className;
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", title);
  add(add(root, "p"), "b").textContent = title;
  return root;
}


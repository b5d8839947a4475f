// Helps the scripts that do what a user would; their answer becomes the text of an element.
const all = (what) => [...document.querySelectorAll(what)];
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
function set(one, value, kind = "input") {
  one.value = value;
  one.dispatchEvent(new Event(kind, { bubbles: true }));
}
async function until(holds) {
  while (!holds()) await new Promise((done) => setTimeout(done, 20));
}
function answer(found) {
  const text = JSON.stringify(found);
  document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: text }));
}
onerror = (message) => answer({ error: message });

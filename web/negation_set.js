// Load Negation Set in the page: pictures come in by a button, by dropping, by pasting; what the set shows is seen before any run, and
// whether it is blurred is nobody's business but the page's. Without this file the node works as it did.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { translated, words } from "./words.js";

const KIND = "SafeDenoiserLoadNegationSet", CHOOSE = "choose a set";
const PICTURES = /\.(png|apng|jpe?g|jfif|webp|bmp|gif|tiff?|avif|hei[cf]|hif|p[pg]m|jp2|tga|ico|zip)$/i;
const LEAST = 150; // pixels: a row of buttons, a line, and a row of pictures; the others are reached by scrolling

const widget = (node, name) => node.widgets?.find((one) => one.name === name);
const isOurs = (file) => file.type.startsWith("image/") || PICTURES.test(file.name);
const BODY = { method: "POST", headers: { "Content-Type": "application/octet-stream" } };

async function ask(route, query, options) {
  const answer = await api.fetchApi(`/safe_denoiser/${route}?${new URLSearchParams(query)}`, options);
  const found = await answer.json().catch(() => ({}));
  return answer.ok ? found : { problem: found.problem ?? `the server answers ${answer.status}` };
}

// --- what is drawn

function element(kind, style, text = "") {
  const made = document.createElement(kind);
  made.style.cssText = style;
  made.textContent = text; // names of files come from strangers: never as HTML
  return made;
}

function drawn(view) {
  const { place, found, said, style, open } = view, shown = open ?? style === "shown";
  place.querySelector(".safe-denoiser-set-line").textContent = said || translated(found.problem || found.info || "drop pictures here, or choose a set");
  const grid = place.querySelector(".safe-denoiser-set-grid");
  grid.title = style === "off" ? "" : words(shown ? "click to blur" : "click to show");
  // a sixth of a picture's width: as much as the server's own previews are blurred, however large the node is made
  grid.replaceChildren(...(style === "off" ? [] : found.pictures ?? []).map(({ name, picture }) => {
    const tile = element("div", "overflow: hidden; min-width: 0"), frame = element("div", "overflow: hidden; border-radius: 3px; container-type: inline-size");
    const image = element("img", `width: 100%; aspect-ratio: 1; display: block; filter: ${shown ? "none" : "blur(16cqw)"}`);
    image.src = picture;
    image.draggable = false;
    frame.append(image);
    tile.append(frame, element("div", "overflow: hidden; text-overflow: ellipsis; white-space: nowrap", name));
    tile.title = name;
    return tile;
  }));
}

function build(node) {
  const place = element("div", "display: flex; flex-direction: column; gap: 4px; height: 100%; box-sizing: border-box; font: 11px sans-serif; color: var(--input-text, #ddd); overflow: hidden; padding: 2px 6px");
  const row = element("div", "display: flex; gap: 4px"), view = { place, found: {}, said: "", style: "blurred", open: undefined };
  const button = (text, act) => {
    const made = element("button", "flex: 1; padding: 3px; cursor: pointer; color: inherit; font: inherit; background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555); border-radius: 4px", text);
    made.addEventListener("click", act);
    row.append(made);
  };
  button(words("add pictures…"), () => pick(node));
  button(words("new set…"), () => makeSet(node));
  const line = element("div", "white-space: pre-wrap; overflow-wrap: anywhere; max-height: 60px; overflow-y: auto; flex: none");
  const rest = element("div", "position: relative; flex: 1 1 auto; min-height: 80px"); // of the node's height, whatever is in it
  const grid = element("div", "position: absolute; inset: 0; display: grid; grid-template-columns: repeat(4, 1fr); grid-auto-rows: max-content; gap: 4px; overflow-y: auto; cursor: pointer");
  rest.append(grid);
  line.className = "safe-denoiser-set-line";
  grid.className = "safe-denoiser-set-grid";
  grid.addEventListener("click", () => { view.open = !(view.open ?? view.style === "shown"); drawn(view); });
  grid.addEventListener("wheel", (event) => { if (grid.scrollHeight > grid.clientHeight) event.stopPropagation(); });
  place.append(row, line, rest);
  const made = node.addDOMWidget("safe_denoiser_set", "safe_denoiser_set", place, { serialize: false, hideOnZoom: false, getMinHeight: () => LEAST, getValue: () => "", setValue: () => {} });
  made.serialize = false;
  node.safeDenoiserSet = view;
}

// --- what is asked of the server

async function look(node, said = "") {
  const view = node.safeDenoiserSet, name = widget(node, "folder")?.value;
  const slow = setTimeout(() => say(node, words("looking at the pictures…")), 700);
  const found = await ask("set", { name: name ?? "", max: widget(node, "max_images")?.value ?? 0 }).catch(() => ({ problem: "the server does not answer" }));
  clearTimeout(slow);
  if (name !== widget(node, "folder")?.value) return; // chosen anew in the meantime, and asked again
  Object.assign(view, { found, said, style: widget(node, "preview")?.value, open: undefined });
  drawn(view);
}

function say(node, text) {
  node.safeDenoiserSet.said = text;
  drawn(node.safeDenoiserSet);
}

async function choose(node, name, said = "") {
  widget(node, "folder").value = name;
  node.safeDenoiserSet.said = said;
  await app.refreshComboInNodes?.(); // lists the set, and has all that is shown looked up anew
  node.graph?.setDirtyCanvas?.(true, true);
  await look(node, said);
}

async function makeSet(node) {
  const title = words("new set"), message = words("Name of the set: a folder in ComfyUI's input/negation_sets");
  const name = await (app.extensionManager?.dialog?.prompt?.({ title, message, defaultValue: "" }) ?? window.prompt(message));
  if (!name) return "";
  const { set, problem } = await ask("set", { name }, BODY);
  if (problem) say(node, translated(problem));
  else await choose(node, set);
  return set ?? "";
}

async function add(node, files) {
  const zips = files.filter((file) => /\.zip$/i.test(file.name)), pictures = files.filter((file) => !zips.includes(file));
  let set = widget(node, "folder").value, added = 0, already = 0;
  if (pictures.length && !(await ask("set", { name: set, max: 1 })).own) set = await makeSet(node);
  if (pictures.length && !set) return;
  const problems = [];
  for (const [i, file] of [...pictures, ...zips].entries()) {
    say(node, words("adding {0} of {1}", i + 1, files.length));
    const told = await ask("picture", { set, name: file.name }, { ...BODY, body: file }).catch(() => ({ problem: "the server does not answer" }));
    if (told.problem) problems.push(`${file.name}: ${translated(told.problem)}`);
    else if (zips.includes(file)) set = told.set;
    else if (told.added) added += 1;
    else already += 1;
  }
  const parts = [pictures.length && words("added {0}", added), already && words("{0} already there", already), ...problems.slice(0, 5), problems.length > 5 && words("and {0} more that were not added", problems.length - 5)];
  await choose(node, set, parts.filter(Boolean).join("\n"));
}

function pick(node) {
  const input = element("input", "display: none");
  Object.assign(input, { type: "file", multiple: true, accept: "image/*,.zip" });
  input.addEventListener("change", () => { void add(node, [...input.files]); input.remove(); });
  input.addEventListener("cancel", () => input.remove());
  document.body.append(input); // so that it is not collected while its dialog is open
  input.click();
}

function paste(event) {
  const chosen = Object.values(app.canvas?.selected_nodes ?? {}), files = [...(event.clipboardData?.files ?? [])].filter(isOurs);
  const writing = event.target?.closest?.("input, textarea, [contenteditable=true]");
  if (writing || chosen.length !== 1 || chosen[0].comfyClass !== KIND || !files.length) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  void add(chosen[0], files);
}

function follow(node, name) {
  const one = widget(node, name), before = one?.callback;
  if (one) one.callback = function (...args) { before?.apply(this, args); void look(node); };
}

app.registerExtension({
  name: "SafeDenoiser.NegationSet",
  setup: () => document.addEventListener("paste", paste, true),
  nodeCreated(node) {
    if (node.comfyClass !== KIND) return;
    build(node);
    for (const name of ["folder", "max_images", "preview"]) follow(node, name);
    const preview = widget(node, "preview"), configured = node.onConfigure;
    if (preview) preview.serializeValue = () => "off"; // the server draws nothing: to blur or to show is no reason to sample again
    node.onConfigure = function (...args) { configured?.apply(this, args); setTimeout(() => look(node)); };
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    node.onDragDrop = (event) => {
      const files = [...(event.dataTransfer?.files ?? [])].filter(isOurs);
      if (files.length) void add(node, files);
      return files.length > 0;
    };
    setTimeout(() => look(node));
  },
  refreshComboInNodes: () => { for (const node of app.graph?.nodes ?? []) if (node.safeDenoiserSet) void look(node, node.safeDenoiserSet.said); },
});

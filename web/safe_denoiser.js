// What the safe denoiser did, as a text on the node that steered, whether pictures are blurred, why a node was refused, and the colours of our wires. Without this file everything else works.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { translated } from "./words.js";

const TEXT = "safe_denoiser_text", STORE = "safe_denoiser.texts";
const LINE = 15, MARGIN = 4, FONT = "11px sans-serif"; // pixels

// --- Texts on nodes. The page's own text on a running node goes when the run ends (front ends from 1.55), or is saved into the workflow as
// if it were a widget's value (those before); this one stays through tabs and reloads, and out of the workflow.

// By the path of the workflow: the id of its graph, since an unsaved workflow's path is given out again, and the texts by the id with which
// a node runs. The id alone would not do: every tab with the same template has the same.
const texts = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
const prompts = {}; // where a prompt came from: its tab need not be the one that is shown when it runs
let here = "", open = []; // the path of the graph that is shown, and of all tabs, when we last looked

const shown = () => app.extensionManager?.workflow?.activeWorkflow?.path ?? "";
const tabs = () => (app.extensionManager?.workflow?.openWorkflows ?? []).map((one) => one.path);
const rootGraph = () => app.rootGraph ?? app.graph;
const keep = () => sessionStorage.setItem(STORE, JSON.stringify(texts));

// The texts of a workflow that was saved under another name go with it.
function follow() {
  const now = shown();
  if (here !== now && !tabs().includes(here)) {
    for (const one of Object.values(prompts)) if (one.path === here) one.path = now;
    if (texts[here]) [texts[now], texts[here]] = [texts[here], undefined];
    here = now;
    keep();
  }
}

// A node that runs, and the subgraphs around it: "12:5" is node 5 in the subgraph of node 12.
function* nodesOf(id) {
  let graph = rootGraph();
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    if (!node) return;
    yield node;
    graph = node.subgraph;
  }
}

function erase(node) {
  const place = node.widgets?.findIndex((one) => one.name === TEXT) ?? -1;
  if (place < 0) return;
  node.widgets[place].onRemove?.();
  node.widgets[place].element?.remove();
  node.widgets.splice(place, 1);
}

// In how many lines a text stands, that wraps at this width.
function linesOf(text, width) {
  const pen = linesOf.pen ??= document.createElement("canvas").getContext("2d");
  pen.font = FONT;
  let count = 0;
  for (const paragraph of text.split("\n")) {
    let line = "";
    count += 1;
    for (const word of paragraph.split(/(?<= )/)) {
      if (line && pen.measureText((line + word).trimEnd()).width > width) [line, count] = ["", count + 1];
      line += word;
      count += Math.max(0, Math.ceil(pen.measureText(word).width / width) - 1); // a name longer than a line
    }
  }
  return count;
}

function write(node, text) {
  let widget = node.widgets?.find((one) => one.name === TEXT);
  if (!widget) {
    const place = document.createElement("div");
    place.className = "safe-denoiser-text";
    place.style.cssText = `font: ${FONT}; line-height: ${LINE}px; color: var(--input-text, #ddd); white-space: pre-wrap; overflow-wrap: anywhere; overflow: hidden; padding: 2px 6px; box-sizing: border-box`;
    const height = () => 2 * MARGIN + 4 + LINE * Math.max(2, linesOf(place.textContent, node.size[0] - 44));
    widget = node.addDOMWidget(TEXT, TEXT, place, { // a type that the page has no form of its own for
      serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: height, getMaxHeight: height,
      getValue: () => place.textContent, setValue: (value) => { place.textContent = value; },
    });
    widget.serialize = false; // the first keeps it out of the prompt, this out of the workflow
  }
  widget.element.textContent = translated(text); // names of pictures come from strangers: never as HTML
  const [width, height] = node.computeSize();
  if (node.size[1] < height) node.setSize([Math.max(width, node.size[0]), height]);
  node.setDirtyCanvas?.(true, true);
}

function tell({ detail: { node, prompt_id: prompt, text } }) {
  follow();
  const { path, graph } = prompts[prompt] ?? { path: shown(), graph: rootGraph().id };
  if (texts[path]?.graph !== graph) texts[path] = { graph, nodes: {} };
  texts[path].nodes[node] = text;
  keep();
  if (path === shown() && graph === rootGraph().id) for (const one of nodesOf(node)) write(one, text);
}

// What is said before any run: of Sample Reference Bank, and of a blueprint with one in it, that the first takes longer.
function foretold() {
  const samples = (node) => node.comfyClass === "SafeDenoiserSampleReferenceBank" || node.subgraph?.nodes.some(samples);
  return rootGraph().nodes.filter(samples).map((node) => [node, "the first run draws as many pictures as count says before yours, at the same speed; they are kept"]);
}

function restore() {
  const now = tabs();
  for (const path of open) if (!now.includes(path)) delete texts[path]; // its tab was closed
  [open, here] = [now, shown()];
  keep();
  const mine = texts[here]?.graph === rootGraph().id ? Object.entries(texts[here].nodes) : [];
  const told = new Map([...foretold(), ...mine.flatMap(([id, text]) => [...nodesOf(id)].map((node) => [node, text]))]);
  for (const node of rootGraph().nodes) if (!told.has(node)) erase(node);
  for (const [node, text] of told) write(node, text);
}

// --- Blur belongs to the page: a set's picture comes blurred and sharp, and which of them is seen is no reason to run its node again.

const again = new WeakSet(); // what we tell the page ourselves

function look(node) {
  const { detail, sharp } = node.safeDenoiserSheet ?? {};
  if (!detail) return;
  const style = node.widgets.find((one) => one.name === "preview")?.value;
  const images = { blurred: detail.output.images, shown: sharp, off: [] }[style];
  const told = { ...detail, output: { ...detail.output, images } };
  again.add(told);
  api.dispatchCustomEvent("executed", told);
  if (style === "off") node.imgs = node.images = undefined; // none are no news to the canvas
  node.setDirtyCanvas?.(true, true);
}

function took({ detail }) {
  const node = detail.output?.safe_denoiser_sharp && !again.has(detail) && [...nodesOf(detail.display_node ?? detail.node)].at(-1);
  if (!node) return;
  node.safeDenoiserSheet = { detail, sharp: detail.output.safe_denoiser_sharp };
  setTimeout(() => look(node)); // after the page has taken it
}

function blurHere(node) {
  const preview = node.comfyClass !== "SafeDenoiserReport" && ours(node.comfyClass) && node.widgets?.find((one) => one.name === "preview");
  if (!preview || preview.serializeValue) return; // Load Negation Set draws its own
  const before = preview.callback;
  preview.callback = function (...args) { before?.apply(this, args); look(node); };
  preview.serializeValue = () => preview.value === "off" ? "off" : "blurred";
}

// --- Where another part of the workflow can still run, older pages only draw a red line around a node that was refused. This says why.

const ours = (type) => type?.startsWith("SafeDenoiser");
const pageSaysIt = () => !!document.querySelector("[data-testid=error-overlay]");

function sayWhatWasRefused() {
  if (pageSaysIt()) return;
  for (const error of Object.values(app.lastNodeErrors ?? {})) {
    if (!ours(error.class_type)) continue;
    const summary = window.LiteGraph?.registered_node_types?.[error.class_type]?.title ?? error.class_type;
    const detail = (error.errors ?? []).map((one) => one.details || one.message).join("\n");
    app.extensionManager?.toast?.add({ severity: "error", summary, detail, life: 30000 });
  }
}

// --- A colour for each kind of wire. A colour scheme that is chosen later would make all of ours grey again: neither accessors nor a style
// sheet are touched by that.

const COLOURS = { NEGATION_SET: "#e8a33d", NEGATION_BANK: "#d9623b", SAFE_DENOISER_REPORT: "#5fa8d3", OPEN_CLIP: "#c9b458", CHECKED_IMAGES: "#5fbf8f", SEMANTIC_POSTERIOR: "#b57edc" };

function colour() {
  for (const map of [window.LGraphCanvas?.link_type_colors, app.canvas?.default_connection_color_byType]) {
    for (const [kind, value] of Object.entries(COLOURS)) if (map) Object.defineProperty(map, kind, { get: () => value, set() {}, enumerable: true, configurable: true });
  }
  const sheet = document.createElement("style");
  sheet.textContent = `:root { ${Object.entries(COLOURS).map(([kind, value]) => `--color-datatype-${kind}: ${value};`).join(" ")} }`;
  document.head.append(sheet);
}

app.registerExtension({
  name: "SafeDenoiser",
  setup() {
    colour();
    const queue = api.queuePrompt;
    api.queuePrompt = async function (...args) {
      follow();
      const from = { path: shown(), graph: rootGraph().id };
      const answer = await queue.apply(this, args);
      if (answer?.prompt_id) prompts[answer.prompt_id] = from;
      return answer;
    };
    api.addEventListener("safe_denoiser.text", tell);
    api.addEventListener("executed", took);
    window.addEventListener("pagehide", follow);
    api.addEventListener("promptQueued", () => setTimeout(sayWhatWasRefused, 500)); // after the page has had its say
  },
  nodeCreated: (node) => setTimeout(() => {
    blurHere(node);
    for (const [one, text] of foretold()) if (one === node) write(one, text);
  }),
  beforeConfigureGraph: follow, // the page still names the workflow that it leaves
  afterConfigureGraph() {
    for (const soon of [200, 1500]) setTimeout(restore, soon); // the page names the workflow that is shown some time after it has shown it
  },
});

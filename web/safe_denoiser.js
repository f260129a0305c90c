// Two small gaps of ComfyUI's page. Without this file everything works; only these two are missing.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const ours = (type) => type?.startsWith("SafeDenoiser");

// The numbers of a running sampler are a text on the node, which the page saves into the workflow as if it were the value of one
// more widget. This keeps it out, so that a widget that is added to the node one day gets no text for a value.
function keepTextOut() {
  for (const node of (app.canvas?.graph ?? app.graph)?.nodes ?? []) {
    if (!ours(node.type)) continue;
    for (const widget of node.widgets ?? []) if (widget.name === "$$node-text-preview") widget.serialize = false;
  }
}

// Where another part of the workflow can still run, the page only draws a red line around a node that was refused. This says why.
function sayWhatWasRefused() {
  for (const error of Object.values(app.lastNodeErrors ?? {})) {
    if (!ours(error.class_type)) continue;
    const summary = window.LiteGraph?.registered_node_types?.[error.class_type]?.title ?? error.class_type;
    const detail = (error.errors ?? []).map((one) => one.details || one.message).join("\n");
    app.extensionManager?.toast?.add({ severity: "error", summary, detail, life: 30000 });
  }
}

app.registerExtension({
  name: "SafeDenoiser",
  setup() {
    api.addEventListener("progress_text", () => setTimeout(keepTextOut));
    api.addEventListener("promptQueued", sayWhatWasRefused);
  },
});

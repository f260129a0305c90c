// ComfyUI shows the numbers of a running sampler as a text on the node, and then saves that text into the workflow as if it were
// the value of one more widget. This keeps it out, so that a widget that is added to the node one day gets no text for a value.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

function keepOut(node) {
  if (!node?.type?.startsWith("SafeDenoiser")) return;
  for (const widget of node.widgets ?? []) if (widget.name === "$$node-text-preview") widget.serialize = false;
}

app.registerExtension({
  name: "SafeDenoiser.LiveText",
  setup() {
    api.addEventListener("progress_text", () => setTimeout(() => (app.canvas?.graph ?? app.graph)?.nodes?.forEach(keepOut)));
  },
});

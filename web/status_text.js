// Keeps the last line of each of our nodes (tokens, face counts, file names) on the node after a run.
//
// The nodes send it twice: as progress text, which newer front ends clear when a job ends, and as output, which they keep
// but do not show. This puts the latter where the former was.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const ENDS = ["execution_success", "execution_error", "execution_interrupted", "executing"];
const AFTER_CLEARING = 100; // ms: the front end's own listeners clear the text first
const lines = new Map(); // node -> its last line

const isOurs = (name) => name === "LoadD3DS2Model" || name?.startsWith("D3DS2");

function show(node, text) {
  lines.set(node, text);
  api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text });
}

function showAll() {
  for (const [node, text] of lines) {
    if (node.graph?.getNodeById(node.id) !== node) lines.delete(node); // it was deleted, or another graph was opened
    else if (node.graph === app.canvas.graph) show(node, text);
  }
}

app.registerExtension({
  name: "D3DS2.StatusText",

  setup() {
    for (const end of ENDS) {
      api.addEventListener(end, ({ detail }) => {
        if (end !== "executing" || detail === null) setTimeout(showAll, AFTER_CLEARING);
      });
    }
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!isOurs(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.status_text?.length) show(this, output.status_text.join("\n"));
    };
  },

  // a workflow that was open before, or one from the history
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(Number(id));
      if (isOurs(node?.comfyClass) && output?.status_text?.length) show(node, output.status_text.join("\n"));
    }
  },
});

// Gives our sockets and their links a colour each, in classic nodes and in Nodes 2.0.

import { app } from "../../scripts/app.js";

const COLORS = {
  D3DS2_MODEL: "#b39ddb", // as core's MODEL
  D3DS2_STRUCTURE: "#4db6ac",
  D3DS2_LATENT: "#ff9cf9", // as core's LATENT
  D3DS2_SDF: "#ffb74d",
  BACKGROUND_REMOVAL: "#c5e1a5",
};

function colorLinks() {
  const canvas = app.canvas;
  for (const table of [canvas?.default_connection_color_byType, canvas?.constructor.link_type_colors]) {
    for (const [type, color] of Object.entries(COLORS)) if (table && !table[type]) table[type] = color;
  }
  canvas?.setDirty(true, true);
}

app.registerExtension({
  name: "D3DS2.SocketColors",

  setup() {
    const style = document.createElement("style"); // Nodes 2.0 read these; a palette's own colour comes before them
    const rules = Object.entries(COLORS).map(([type, color]) => `--color-datatype-${type}: ${color};`);
    style.textContent = `:root { ${rules.join(" ")} }`;
    document.head.append(style);
    colorLinks();
    // a new palette clears the colours of all types that it does not know, after this event
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(colorLinks, 100));
  },

  afterConfigureGraph: colorLinks, // the first palette may be loaded after `setup`
});

// The page in the user's language, by the tables in locales/*/main.json, which ComfyUI serves. What has no words there stays English.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

let table = {}, sentences = []; // English -> theirs; and the same as patterns, the most particular first

const filled = (text, values) => text.replace(/\{(\d)\}/g, (_, i) => values[i]);
const literal = (text) => text.replace(/[.*+?^$()|[\]\\]/g, "\\$&");

async function learn() {
  const answer = await api.fetchApi("/i18n").catch(() => undefined), all = answer?.ok ? await answer.json() : {};
  table = all[app.extensionManager?.setting?.get("Comfy.Locale")]?.safeDenoiser ?? {};
  sentences = Object.entries(table).map(([english, theirs]) => ({
    pattern: RegExp(`^${literal(english).replace(/\{\d\}/g, "(.+?)")}$`), theirs, length: english.replace(/\{\d\}/g, "").length,
  })).sort((a, b) => b.length - a.length);
}

/** A text of the page, with values in place of {0}, {1}. */
export const words = (english, ...values) => filled(table[english] ?? english, values);

function sentence(line) {
  for (const { pattern, theirs } of sentences) {
    const found = pattern.exec(line);
    if (found) return filled(theirs, found.slice(1).map(sentence)); // a sentence may hold another: "7 of 16 pictures"
  }
  return line;
}

/** What the server said, line by line. */
export const translated = (text) => text.split("\n").map(sentence).join("\n");

app.registerExtension({ name: "SafeDenoiser.Words", setup: learn });

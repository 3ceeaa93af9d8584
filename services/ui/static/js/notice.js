// One line above the page: that what it shows is old, or that what was asked for failed.
import { fill } from "./dom.js";
import { visible } from "./text.js";

/** Say it; an empty text takes it away. */
export function notice(text) {
  const line = document.getElementById("notice");
  line.hidden = !text;
  fill(line, visible(text, 500));
}

// Light or dark: as the system says, or as one chose in this browser.

const KEY = "offbeat.theme";
const CHOICES = ["system", "light", "dark"];

export const theme = () => localStorage.getItem(KEY) ?? "system";

export function applyTheme(choice = theme()) {
  localStorage.setItem(KEY, choice);
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  window.dispatchEvent(new Event("theme"));
}

export function nextTheme() {
  applyTheme(CHOICES[(CHOICES.indexOf(theme()) + 1) % CHOICES.length]);
  return theme();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => window.dispatchEvent(new Event("theme")));

const known = new Map();
window.addEventListener("theme", () => known.clear(), { capture: true });

/** The colour that a variable of the style sheets has now, as a canvas takes it. */
export function colour(name) {
  if (!known.has(name)) known.set(name, computed(name));
  return known.get(name);
}

function computed(name) {
  const probe = document.getElementById("say");
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.style.color = "";
  return found;
}

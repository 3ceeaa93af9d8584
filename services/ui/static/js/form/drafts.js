// Specs that were begun and not submitted: they stay in this tab, one for each run that they began from.

const KEY = "offbeat.drafts";

/** Specs, as what differs from the defaults, by the id of that run; "" for those that began from none. The latest is the last one. */
export const drafts = () => new Map(JSON.parse(sessionStorage.getItem(KEY) ?? "[]"));

export const forgetDrafts = () => sessionStorage.removeItem(KEY);

/** Keep it; null drops the one that is kept. What is `unread` in it is left out. */
export function keepDraft(like, tree, unread) {
  const kept = drafts();
  kept.delete(like);
  if (tree) kept.set(like, tree);
  sessionStorage.setItem(KEY, JSON.stringify([...kept], (_, value) => (value === unread ? undefined : value)));
}

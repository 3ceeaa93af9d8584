// The token of this tab: kept until the tab is closed, sent with each request, and in no address.

const KEY = "offbeat.token";

export const token = () => sessionStorage.getItem(KEY) ?? "";

export function logIn(value) {
  sessionStorage.setItem(KEY, value);
}

export function logOut() {
  if (!token()) return; // of several requests that are refused, the first one ends the session
  sessionStorage.removeItem(KEY);
  window.dispatchEvent(new Event("logged-out"));
}

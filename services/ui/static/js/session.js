// The token of this tab: kept until the tab is closed, sent with each request, and in no address.

const KEY = "offbeat.token";

export const token = () => sessionStorage.getItem(KEY) ?? "";

export function logIn(value) {
  sessionStorage.setItem(KEY, value);
}

export function logOut() {
  sessionStorage.removeItem(KEY);
  window.dispatchEvent(new Event("logged-out"));
}

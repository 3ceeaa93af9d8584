// Server-sent events over fetch: EventSource cannot send the header with the token.
import { ApiError, request } from "./api.js";

const HIDDEN = 5_000; // a browser has six connections to a server for all of its tabs: one that nobody sees gives its own back
const PAUSES = [500, 1_000, 2_000, 5_000];
const SILENCE = 30_000; // the server says something every ten seconds: a stream that is silent for longer is dead

/** Follow `path` until its `end`, through breaks: each message goes to `on(event, data)`, the state of the connection to `connection`. */
export async function follow(path, { params, signal, on, connection }) {
  let after;
  let failed = 0;
  while (!signal.aborted) {
    await shown(signal);
    const looking = whileShown(signal);
    try {
      const response = await request(path, { params: { ...params, after }, headers: { Accept: "text/event-stream" }, signal: looking.signal });
      connection("open");
      for await (const message of messages(response.body)) {
        failed = 0;
        if (message.event === "end") return connection("over");
        if (message.id) after = message.id;
        on(message.event, JSON.parse(message.data));
      }
    } catch (error) {
      if (signal.aborted) return undefined;
      if (error instanceof ApiError && error.status >= 400 && error.status < 500) throw error;
    } finally {
      looking.over();
    }
    connection("away");
    await sleep(PAUSES[Math.min(failed++, PAUSES.length - 1)], signal);
  }
  return undefined;
}

/** {signal, over()}: aborted with `signal`, and when the tab has been hidden for a while. */
function whileShown(signal) {
  const control = new AbortController();
  const listening = new AbortController();
  let timer;
  const look = () => {
    clearTimeout(timer);
    if (document.hidden) timer = setTimeout(() => control.abort(), HIDDEN);
  };
  document.addEventListener("visibilitychange", look, { signal: listening.signal });
  signal.addEventListener("abort", () => control.abort(), { signal: listening.signal });
  look();
  return { signal: control.signal, over: () => { clearTimeout(timer); listening.abort(); } };
}

/** Until the tab is seen, or the signal aborted. */
function shown(signal) {
  if (!document.hidden || signal.aborted) return undefined;
  return new Promise((resolve) => {
    const done = new AbortController();
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      done.abort();
      resolve();
    };
    document.addEventListener("visibilitychange", look, { signal: done.signal });
    signal.addEventListener("abort", look, { signal: done.signal });
  });
}

/** The messages of a stream of bytes: {event, data, id}. */
export async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await inTime(reader.read());
      if (done) return;
      buffer += value;
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const message = parsed(buffer.slice(0, end));
        buffer = buffer.slice(end + 2);
        if (message) yield message;
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

function inTime(reading) {
  let timer;
  const silent = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error("silence")), SILENCE); });
  return Promise.race([reading, silent]).finally(() => clearTimeout(timer));
}

function parsed(block) {
  const message = { event: "message", data: "", id: "" };
  let said = false;
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    if (colon <= 0) continue; // a comment
    const value = line.slice(colon + 1).replace(/^ /, "");
    const name = line.slice(0, colon);
    if (name === "data") message.data += message.data ? `\n${value}` : value;
    else if (name === "event" || name === "id") message[name] = value;
    said ||= name === "data";
  }
  return said ? message : null;
}

function sleep(milliseconds, signal) {
  return new Promise((resolve) => {
    const done = () => { clearTimeout(timer); signal.removeEventListener("abort", done); resolve(); };
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", done);
  });
}

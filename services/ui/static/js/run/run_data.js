// All that the page knows of one run, as it comes: curves, lags, evaluations, events, state. Shared by the tabs of the run.
import { part } from "../api.js";
import { Columns } from "../charts/columns.js";
import { NEWEST } from "../charts/lag_histogram.js";
import { ASKED_KEYS, KEYS } from "../charts/panels.js";
import { follow } from "../live.js";

const LINGER = 3_000; // from one tab of a run to the next the data stay
const watched = new Map();

export class RunData extends EventTarget {
  constructor(runId) {
    super();
    this.runId = runId;
    this.columns = new Columns(KEYS);
    this.newest = [];
    this.evaluations = [];
    this.events = [];
    this.state = null;
    this.connection = "connecting";
    this.rewardServers = 1;
    this.users = 0;
    this.stop = new AbortController();
  }

  start() {
    follow(`runs/${part(this.runId)}/live`, {
      params: { keys: ASKED_KEYS.join(",") }, signal: this.stop.signal,
      on: (event, data) => this.#take(event, data),
      connection: (connection) => { this.connection = connection; this.#tell("connection"); },
    }).catch((error) => { this.error = error; this.#tell("failed"); });
  }

  #take(event, data) {
    if (event === "steps") {
      for (const step of data) {
        this.columns.put(step.version, { ...step.values, window_low: step.window[0], window_high: step.window[1], reward_servers: this.rewardServers });
      }
      this.newest = [...this.newest, ...data.slice(-NEWEST)].slice(-NEWEST);
    } else if (event === "evaluations") this.evaluations.push(...data);
    else if (event === "events") this.events.push(...data);
    else if (event === "state") this.state = data;
    this.#tell(event);
  }

  #tell(event) {
    this.dispatchEvent(new Event(event));
  }

  /** Versions from which knobs were turned: marks in every chart. */
  get marks() {
    return [...new Set(this.events.filter((event) => event.event.startsWith("knobs_")).map((event) => event.version))];
  }

  /** Names of the evaluation sets that were evaluated. */
  get sets() {
    return [...new Set(this.evaluations.map((one) => one.name))];
  }
}

/** The run's data, followed until the signals of all who watch are aborted. */
export function watch(runId, signal) {
  const data = watched.get(runId) ?? new RunData(runId);
  if (!watched.has(runId)) {
    watched.set(runId, data);
    data.start();
  }
  data.users++;
  signal.addEventListener("abort", () => {
    data.users--;
    setTimeout(() => {
      if (data.users > 0 || watched.get(runId) !== data) return;
      data.stop.abort();
      watched.delete(runId);
    }, LINGER);
  }, { once: true });
  return data;
}

/** Call `action` at each of these events until the signal is aborted. */
export function on(data, events, action, signal) {
  for (const event of events) data.addEventListener(event, action, { signal });
}

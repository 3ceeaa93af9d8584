// The API: JSON in and out, problem documents as errors.
import { logOut, token } from "./session.js";

export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title);
    this.status = status;
    this.title = problem.title;
    /** [{field, problem}] */
    this.errors = problem.errors ?? [];
  }
}

/** Answers the response itself; throws ApiError. */
export async function request(path, { method = "GET", body, params = {}, headers = {}, signal } = {}) {
  const used = token();
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value !== undefined && value !== null && value !== ""));
  const response = await reached(`/v1/${path}${query.size ? `?${query}` : ""}`, {
    method, signal, cache: "no-store", credentials: "omit", redirect: "error",
    headers: { Authorization: `Bearer ${used}`, Accept: "application/json", ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ title: `The server answered ${response.status}` }));
  if (response.status === 401 && used === token()) logOut(); // not a new session for what an old one had asked
  throw new ApiError(response.status, problem);
}

/** A question is asked twice: a browser drops what is under way when a network comes or goes. */
async function reached(url, options, tries = options.method === "GET" ? 2 : 1) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (tries > 1) return reached(url, options, tries - 1);
    throw new ApiError(0, { title: "The control plane cannot be reached", detail: "It does not answer." });
  }
}

export const get = async (path, params, signal) => (await request(path, { params, signal })).json();
export const post = async (path, body, headers) => (await request(path, { method: "POST", body, headers })).json();
export const patch = async (path, body) => (await request(path, { method: "PATCH", body })).json();
export const part = encodeURIComponent;

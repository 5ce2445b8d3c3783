/**
 * Requests to the server, and why it refuses them. This module knows neither the state nor the document. Addresses are
 * relative to the page's own, so that the page works below any path.
 */

import { finished } from "./cog.js";
import { readJson } from "./schema.js";

const TOKEN = "flux-sprites-token";
const SECONDS_FOR_AN_ANSWER = 12; // to all but a drawing; a Cog server takes 10 to say that its predictor hangs
const POLL_MS = 500; // between two requests to a front for the steps of a drawing
const MOST_LOST = 20; // requests to a front that fail in a row before the drawing is given up
const EVENTS_MS = 2000; // how long a drawing waits for its stream of steps to open

const UNREACHABLE = "The server cannot be reached.";
const SILENT = `The server has not answered for ${SECONDS_FOR_AN_ANSWER} seconds.`;
const TRY_AGAIN = /[;.]\s*try again( later)?\.?$/i; // cut off, as the page does so by itself
const TOO_LARGE = "The request is larger than the server takes: name large files by their address instead.";

/**
 * The server did not do what it was asked; the message is a sentence for the person.
 *
 * `kind` is "unauthorised", "busy", "later", "invalid", "gone" or "failed"; `seconds` until it may be asked again, if
 * it said so; `problems` by input; `token` the one that was sent.
 */
class Refused extends Error {
    constructor(kind, sentence, { seconds = null, problems = {}, token = "" } = {}) {
        super(sentence);
        Object.assign(this, { kind, seconds, problems, token });
    }
}

export function unauthorised(token) {
    return new Refused("unauthorised", `The server ${token ? "does not take this" : "wants a"} token.`, { token });
}

let held = ""; // the token of requests; "" is none
try {
    held = sessionStorage.getItem(TOKEN) ?? "";
} catch {
    // A browser that keeps nothing throws.
}

export const token = () => held;

/** Send this token from now on, and keep it until the browser's tab is closed; "" forgets it. */
export function setToken(text) {
    held = text;
    try {
        sessionStorage.setItem(TOKEN, text);
    } catch {
        // It lasts until the page is loaded again.
    }
}

// Requests, each of which returns a promise.
export const about = () => ask("about.json"); // the server behind this page
export const health = () => ask("../health-check"); // Cog's: `status`, `setup`, `user_healthcheck_error`
export const openapi = () => ask("../openapi.json"); // the document
export const loras = () => ask("loras.json"); // the names of the library's LoRAs
export const setupLog = () => ask("setup.log", { json: false }); // what the predictor prints while it starts

/**
 * Draw, and wait for the end; `onProgress` gets `{status, logs, metrics}` meanwhile.
 *
 * @returns {Promise<object>} the answer, also of a prediction that failed; an aborted one throws the signal's reason
 * @throws {Refused} where it was not drawn
 */
export async function draw(id, input, about, { signal, onProgress }) {
    if (about.server === "front") return drawAtFront(id, input, signal, onProgress);
    if (about.progress !== "events") return put(id, input, { signal });
    const events = new EventSource(`events/${id}`); // of its steps; if it breaks, the drawing goes on without
    events.addEventListener("message", ({ data }) => onProgress(JSON.parse(data)));
    const settled = new Promise((resolve) => {
        for (const type of ["open", "error"]) events.addEventListener(type, resolve);
    });
    try {
        await Promise.race([settled, pause(EVENTS_MS, signal)]);
        return await put(id, input, { signal });
    } finally {
        events.close();
    }
}

/** Cancel a prediction; the request goes out even if the page is being closed. */
export const cancel = (id) => ask(`${predictions(id)}/cancel`, { method: "POST", keepalive: true });

/** Wait; an aborted wait throws the signal's reason. */
export async function pause(milliseconds, signal) {
    signal.throwIfAborted();
    const { promise, resolve } = Promise.withResolvers();
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", resolve);
    await promise;
    clearTimeout(timer);
    signal.removeEventListener("abort", resolve);
    signal.throwIfAborted();
}

const predictions = (id) => `../predictions/${id}`;

/** Ask for a prediction, without a time limit: pictures and uploads take as long as they take. */
const put = (id, input, options) => ask(predictions(id), { method: "PUT", body: { input }, seconds: null, ...options });

/** Begin at once, then ask until it has ended: a front draws each id once, and then ignores the input. */
async function drawAtFront(id, input, signal, onProgress) {
    try {
        // Without the signal: an aborted request may have reached the front, which must then cancel it.
        await insist(() => put(id, input, { headers: { Prefer: "respond-async" } }), ["gone"], signal);
    } finally {
        if (signal.aborted) cancel(id).catch(() => {});
    }
    for (;;) {
        await pause(POLL_MS, signal);
        const answer = await insist(() => askAgain(id, signal), ["gone", "later"], signal);
        if (["succeeded", "failed", "canceled"].includes(answer.status)) return answer;
        onProgress(answer);
    }
}

/** Ask how far it is: only a front that does not know the id looks at the empty input, and refuses it. */
async function askAgain(id, signal) {
    try {
        return await put(id, {}, { signal });
    } catch (error) {
        throw error.kind === "invalid" ? new Refused("failed", "The server has forgotten this drawing.") : error;
    }
}

/** Ask until it is answered: a request that fails for one of these reasons does not end the drawing. */
async function insist(request, reasons, signal) {
    for (let lost = 1; ; lost++) {
        try {
            return await request();
        } catch (error) {
            if (!reasons.includes(error.kind) || lost === MOST_LOST) throw error;
        }
        await pause(POLL_MS, signal);
    }
}

/** The answer to one request, parsed as JSON unless `json` is false; other options go to `fetch` as they are. */
async function ask(address, options = {}) {
    const { body, headers, signal, seconds = SECONDS_FOR_AN_ANSWER, json = true, ...request } = options;
    const sent = new Headers(headers);
    const used = token();
    if (used) sent.set("Authorization", `Bearer ${used}`);
    if (body !== undefined) sent.set("Content-Type", "application/json");
    const signals = [signal, seconds && AbortSignal.timeout(seconds * 1000)].filter(Boolean);
    let answer, text;
    try {
        answer = await fetch(address, {
            ...request,
            headers: sent,
            body: JSON.stringify(body),
            signal: AbortSignal.any(signals),
            cache: "no-store",
        });
        text = await answer.text();
    } catch (error) {
        if (signal?.aborted) throw error;
        throw new Refused("gone", error.name === "TimeoutError" ? SILENT : UNREACHABLE);
    }
    if (answer.ok && !json) return text;
    const said = readJson(text, null);
    if (!answer.ok) throw refusal(answer, said ?? { detail: text }, used);
    if (said === null) throw new Refused("failed", "What answers at the server's address is another program.");
    return said;
}

/** Why the server refuses, by the status and the body of its answer. */
function refusal({ status, headers }, said, token) {
    const detail = said.detail ?? said.error;
    // Proxies answer with a page of HTML.
    const isSentence = typeof detail === "string" && detail.length < 500 && !detail.trimStart().startsWith("<");
    const sentence = isSentence ? detail.trim() : "";
    const seconds = retryAfter(headers.get("Retry-After"));
    if (status === 401) return unauthorised(token);
    if (status === 409) return new Refused("busy", "Busy with another prediction.");
    if (status === 413) return new Refused("failed", TOO_LARGE);
    if (status === 422) {
        const items = Array.isArray(detail) ? detail.filter((item) => item?.loc?.length > 0 && item.msg) : [];
        const problems = Object.fromEntries(items.map(({ loc, msg }) => [loc.at(-1), finished(String(msg))]));
        return new Refused("invalid", finished(sentence || "The server does not take these inputs"), { problems });
    }
    if (status === 429) return new Refused("later", "The server limits how often it is asked.", { seconds });
    if (status === 503) {
        const why = sentence.replace(TRY_AGAIN, "") || "The server takes no more requests now";
        return new Refused("later", finished(why), { seconds });
    }
    if (status === 502 || status === 504) return new Refused("gone", finished(sentence || UNREACHABLE));
    return new Refused("failed", finished(sentence || `The server answered with status ${status}.`));
}

/** The seconds of a header Retry-After, which has a number of them or a date; null where it has neither. */
function retryAfter(text) {
    if (!text) return null;
    const seconds = /^\d+$/.test(text) ? Number(text) : Math.ceil((Date.parse(text) - Date.now()) / 1000);
    return Number.isNaN(seconds) ? null : Math.max(0, seconds);
}

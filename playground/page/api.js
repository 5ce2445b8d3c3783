/**
 * What the server is asked over HTTP, and what it means when it refuses. This module knows neither the state nor the
 * document. Addresses are relative to the page's own, so that it works below any path.
 */

const TOKEN = "flux-sprites-token";
const SECONDS_FOR_AN_ANSWER = 12; // of all but a drawing; a Cog server takes 10 to say that its predictor hangs
const POLL_MS = 500; // how often a front is asked for the steps of a drawing
const LOST_POLLS = 20; // so many in a row, and the drawing is given up
const EVENTS_MS = 2000; // how long a drawing waits for its stream of steps to open

const UNREACHABLE = "The server cannot be reached.";
const SILENT = `The server has not answered for ${SECONDS_FOR_AN_ANSWER} seconds.`;
const TOO_LARGE = "The request is larger than the server takes: name large files by their address instead.";

/** The server did not do what it was asked; the message is a sentence for the person. */
export class Refused extends Error {
    /**
     * @param {"unauthorised"|"busy"|"later"|"invalid"|"gone"|"failed"} kind
     * @param {string} sentence
     * @param {{status?: number, seconds?: number|null, problems?: Object<string, string>}} more the status of HTTP, 0
     *     where there was none; after how many seconds to ask again, if it said so; what is wrong, by input
     */
    constructor(kind, sentence, { status = 0, seconds = null, problems = {} } = {}) {
        super(sentence);
        Object.assign(this, { kind, status, seconds, problems });
    }
}

let held = null; // the token of this visit, once it is set

/** @returns {string} the token of requests, which lasts as long as the browser's tab; "" is none. */
export function token() {
    try {
        return held ?? sessionStorage.getItem(TOKEN) ?? "";
    } catch {
        return ""; // a browser that keeps nothing refuses to be asked
    }
}

/** Send this token from now on; "" forgets it. */
export function setToken(text) {
    held = text;
    try {
        if (text) sessionStorage.setItem(TOKEN, text);
        else sessionStorage.removeItem(TOKEN);
    } catch {
        // It lasts until the page is loaded again.
    }
}

/** @returns {Promise<object>} what is behind this page. */
export const about = () => ask("about.json", { seconds: SECONDS_FOR_AN_ANSWER });

/** @returns {Promise<object>} Cog's health: `status`, `setup`, `user_healthcheck_error`. */
export const health = () => ask("../health-check", { seconds: SECONDS_FOR_AN_ANSWER });

/** @returns {Promise<object>} the OpenAPI document. */
export const openapi = () => ask("../openapi.json", { seconds: SECONDS_FOR_AN_ANSWER });

/** @returns {Promise<string[]>} the names of the library's LoRAs. */
export const loras = () => ask("loras.json", { seconds: SECONDS_FOR_AN_ANSWER });

/** @returns {Promise<string>} what the predictor has printed while it starts. */
export const setupLog = () => ask("setup.log", { seconds: SECONDS_FOR_AN_ANSWER, json: false });

/**
 * Draw, and wait for the end.
 *
 * @param {string} id of the prediction
 * @param {object} input as JSON
 * @param {{server: "cog"|"front", progress: "events"|"poll"|null}} about
 * @param {{signal: AbortSignal, onProgress: function({status: string, logs: string, metrics: object})}} options
 * @returns {Promise<object>} the answer, also of a prediction that failed; an aborted one throws the signal's reason
 * @throws {Refused} where it was not drawn
 */
export async function draw(id, input, about, { signal, onProgress }) {
    if (about.server === "front") return drawAtFront(id, input, signal, onProgress);
    const events = about.progress === "events" ? await follow(id, signal, onProgress) : null;
    try {
        return await ask(predictions(id), { method: "PUT", body: { input }, signal });
    } finally {
        events?.close();
    }
}

/** Cancel a prediction; the request goes out even if the page is being closed. */
export const cancel = (id) => ask(`${predictions(id)}/cancel`, { method: "POST", keepalive: true });

/** Wait; an aborted wait throws the signal's reason. */
export function pause(milliseconds, signal) {
    return new Promise((resolve, reject) => {
        const stop = () => {
            clearTimeout(timer);
            reject(signal.reason);
        };
        const timer = setTimeout(() => {
            signal.removeEventListener("abort", stop);
            resolve();
        }, milliseconds);
        if (signal.aborted) stop();
        else signal.addEventListener("abort", stop, { once: true });
    });
}

const predictions = (id) => `../predictions/${id}`;

/**
 * Begin at once, then ask until it has ended. The first request is not broken off: whether the front has taken it would
 * be unknown then. So it is cancelled after it was answered. A drawing outlives polls that are lost.
 */
async function drawAtFront(id, input, signal, onProgress) {
    await ask(predictions(id), { method: "PUT", body: { input }, headers: { Prefer: "respond-async" } });
    if (signal.aborted) await cancel(id);
    for (let lost = 0; ; ) {
        await pause(POLL_MS, signal);
        try {
            // A known id is answered without a look at the input.
            const answer = await ask(predictions(id), { method: "PUT", body: { input: {} }, signal });
            if (["succeeded", "failed", "canceled"].includes(answer.status)) return answer;
            lost = 0;
            onProgress(answer);
        } catch (error) {
            if (error.kind === "invalid") throw new Refused("failed", "The server has forgotten this drawing.");
            if (!["gone", "later"].includes(error.kind) || ++lost === LOST_POLLS) throw error;
        }
    }
}

/** The stream of a drawing's steps, open; where it breaks or does not open, the drawing goes on without. */
async function follow(id, signal, onProgress) {
    const events = new EventSource(`events/${id}`);
    events.addEventListener("message", ({ data }) => onProgress(JSON.parse(data)));
    const opened = new Promise((resolve) => {
        events.addEventListener("open", resolve);
        events.addEventListener("error", resolve);
    });
    try {
        await Promise.race([opened, pause(EVENTS_MS, signal)]);
    } catch (error) {
        events.close();
        throw error;
    }
    return events;
}

/** One exchange of HTTP, its answer parsed as JSON unless that is not wanted; `request` goes to `fetch` as it is. */
async function ask(address, { body, headers, signal, seconds, json = true, ...request }) {
    const sent = new Headers(headers);
    if (token()) sent.set("Authorization", `Bearer ${token()}`);
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
    const said = parse(text);
    if (!answer.ok) throw refusal(answer, said ?? { detail: text });
    if (said === null) throw new Refused("failed", "What answers at the server's address is another program.");
    return said;
}

function parse(text) {
    try {
        return JSON.parse(text);
    } catch {
        return null;
    }
}

/** Why an answer is none that was asked for. */
function refusal({ status, headers }, said) {
    const detail = said.detail ?? said.error;
    // A page of HTML is what proxies answer by themselves.
    const isSentence = typeof detail === "string" && detail.length < 500 && !detail.trimStart().startsWith("<");
    const sentence = isSentence ? detail.trim() : "";
    switch (status) {
        case 401: {
            const sentence = token() ? "The server does not take this token." : "The server wants a token.";
            return new Refused("unauthorised", sentence, { status });
        }
        case 409:
            return new Refused("busy", "Busy with another prediction.", { status });
        case 413:
            return new Refused("failed", TOO_LARGE, { status });
        case 422: {
            const items = Array.isArray(detail) ? detail.filter((item) => item?.loc?.length > 0 && item.msg) : [];
            const problems = Object.fromEntries(items.map(({ loc, msg }) => [loc.at(-1), finished(String(msg))]));
            const sentences = Object.entries(problems).map(([name, problem]) => `${name}: ${problem}`);
            const whole = sentences.join(" ") || finished(sentence || "The server does not take these inputs");
            return new Refused("invalid", whole, { status, problems });
        }
        case 429:
        case 503: {
            const seconds = retryAfter(headers.get("Retry-After"));
            const full = sentence || "The server takes no more requests now.";
            return new Refused("later", finished(full), { status, seconds });
        }
        case 502:
        case 504:
            return new Refused("gone", finished(sentence || UNREACHABLE), { status });
    }
    return new Refused("failed", finished(sentence || `The server answered with status ${status}.`), { status });
}

const finished = (sentence) => (/[.!?…]$/.test(sentence) ? sentence : `${sentence}.`);

/** Seconds of a header that has these or a date. */
function retryAfter(text) {
    if (!text) return null;
    const seconds = /^\d+$/.test(text) ? Number(text) : Math.ceil((Date.parse(text) - Date.now()) / 1000);
    return Number.isNaN(seconds) ? null : Math.max(0, seconds);
}

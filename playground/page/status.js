/** The states of the server and of the drawings, in words. Views of the state alone. */

import { token } from "./api.js";
import { logLines } from "./cog.js";
import { canDraw, checkNow, useToken } from "./connection.js";
import { cancelAll, cancelJobs, current, outcome } from "./jobs.js";
import { now, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

const LINES = 400; // of a log

// For each state of the server: a word, and, where nothing can be drawn, a title.
const STATES = {
    connecting: { word: "Connecting", title: "Connecting to the server" },
    offline: { word: "Offline", title: "This computer is offline" },
    gone: { word: "No answer", title: "The server does not answer" },
    starting: { word: "Starting", title: "The server is starting" },
    ready: { word: "Ready" },
    drawing: { word: "Drawing" },
    busy: { word: "Busy" },
    "setup-failed": { word: "Setup failed", title: "The server could not be set up" },
    unhealthy: { word: "Unhealthy", title: "The server cannot draw now" },
    unauthorised: { word: "Token wanted", title: "A token is wanted" },
};

/** The state of the server in a word, for the header. Screen readers are told only why nothing can be drawn. */
export function connectionView() {
    const { kind } = state.connection;
    const draws = canDraw() && state.jobs.some((job) => job.status === "drawing");
    const shown = draws ? "drawing" : kind;
    return html`
        <span class="status-pill" role="status" aria-live="off" data-kind=${shown}>${STATES[shown].word}</span>
        <span class="visually-hidden" aria-live="polite">${STATES[kind].title ?? "The server can draw"}</span>
        ${token() && kind !== "unauthorised" ? forgetButton() : nothing}
    `;
}

/** Why nothing can be drawn now, and what a person can do; `nothing` when all is well. */
export function statePanel() {
    const { title } = STATES[state.connection.kind];
    if (!title) return nothing;
    return html`
        <section class="panel stack" aria-label=${title}>
            <h2>${title}</h2>
            ${adviceView(state.connection)}
        </section>
    `;
}

function adviceView({ kind, sentence, log, since, until }) {
    if (kind === "connecting") return unknownBar("Connecting");
    if (kind === "unauthorised") return tokenForm(sentence);
    if (kind === "starting") {
        return html`
            ${unknownBar("Starting")}
            <p class="quiet">Its models have been loading for ${elapsed(since)}; the page goes on by itself.</p>
            ${logBox("Log of the setup", log)}
        `;
    }
    const problem = html`<p class="problem">${sentence}</p>`;
    if (kind === "setup-failed") return [problem, logBox("Log of the setup", log)];
    if (kind === "unhealthy") return [problem, until === null ? goesOn : nextTry(until)];
    return [html`<p>${sentence}</p>`, nextTry(until)];
}

/** The drawing that runs or waits, or else how the last one ended. Its height stays the same. */
export function progressView() {
    const job = current();
    return html`<section class="status-progress" aria-label="Progress">${job ? running(job) : lastEnd()}</section>`;
}

/** The log of the drawing that runs, or of the last one. */
export function logView() {
    const box = logBox("Log", (current() ?? state.jobs.at(-1))?.log);
    return box === nothing ? html`<p class="quiet">Nothing has been said yet.</p>` : box;
}

const goesOn = html`<p class="quiet">The page goes on as soon as it can again.</p>`;

function nextTry(until) {
    const seconds = secondsUntil(until);
    return html`
        <div class="row">
            <button class="button" @click=${checkNow}>Try now</button>
            <span class="quiet status-digits">${seconds > 0 ? `Next try in ${seconds} s` : "Trying"}</span>
        </div>
    `;
}

function tokenForm(sentence) {
    const wrong = token() !== "";
    const send = (event) => {
        event.preventDefault();
        useToken(new FormData(event.target).get("token").trim());
    };
    return html`
        <form class="stack" @submit=${send}>
            <div class="field">
                <label for="token">Token</label>
                <input
                    id="token"
                    name="token"
                    type="password"
                    autocomplete="off"
                    required
                    aria-invalid=${wrong}
                    aria-describedby="token-hint"
                />
                <p id="token-hint" class=${wrong ? "problem" : "hint"}>
                    ${sentence} ${wrong ? nothing : "It is kept until this tab of the browser is closed."}
                </p>
            </div>
            <div class="row">
                <button class="button primary" type="submit">Use token</button>
                ${wrong ? forgetButton() : nothing}
            </div>
        </form>
    `;
}

const forgetButton = () => html`
    <button class="button quiet" type="button" @click=${() => useToken("")}>Forget token</button>
`;

/** A bar without an end in sight. */
const unknownBar = (name) => html`<progress class="status-unknown" aria-label=${name}></progress>`;

function running(job) {
    const isDrawing = job.status === "drawing";
    const more = counted("drawing") - (isDrawing ? 1 : 0);
    const cancelAllButton = html`<button class="button quiet" @click=${cancelAll}>Cancel all</button>`;
    return html`
        <div class="status-line" data-status=${job.status}>
            <p>
                ${isDrawing ? drawing(job) : waiting(job)}
                <span class="quiet">${more > 0 ? `${more} more drawn beside it.` : nothing}</span>
            </p>
            ${counted("drawing", "waiting", "queued") > 1 ? cancelAllButton : nothing}
            <button class="button" @click=${() => cancelJobs([job])}>Cancel</button>
        </div>
        ${isDrawing && job.of !== null
            ? html`<progress aria-label="Drawing" max=${job.of} value=${job.at}></progress>`
            : unknownBar(isDrawing ? "Drawing" : "Waiting")}
    `;
}

function drawing({ at, of, startedAt }) {
    const waits = counted("waiting", "queued");
    const others = waits === 1 ? "1 waits here" : `${waits} wait here`;
    const facts = waits > 0 ? `${elapsed(startedAt)} · ${others}` : elapsed(startedAt);
    const silent = state.about.progress === null ? "This server does not tell its steps." : "";
    return html`
        <span class="status-digits">${of === null ? "Drawing" : `Step ${at} of ${of}`}</span>
        <span class="quiet status-digits">${facts}</span>
        <span class="quiet">${silent}</span>
    `;
}

/** Why it waits, and how many others do; where the server is full, for how long. */
function waiting({ error, until }) {
    if (!canDraw()) return "Waiting until the server can draw.";
    const waits = counted("waiting", "queued");
    const others = waits > 1 ? `; ${waits} of yours wait.` : ".";
    if (until === null) {
        const next = waits === 1 && state.about.server === "cog" ? "; yours is next" : "";
        return `${error.replace(/\.$/, "")}${next}${others}`;
    }
    const again = `Asked again in ${Math.max(1, secondsUntil(until))} s${others}`;
    return html`${error} <span class="quiet status-digits">${again}</span>`;
}

/** How many jobs have any of these states. */
const counted = (...statuses) => state.jobs.filter(({ status }) => statuses.includes(status)).length;

/** How the last drawing ended. */
function lastEnd() {
    const job = state.jobs.findLast(({ kind }) => kind === "draw");
    if (job === undefined) return nothing;
    if (job.status === "failed") return html`<p class="problem">${job.error}</p>`;
    return html`<p class="quiet">${job.status === "canceled" ? (job.error ?? "Cancelled.") : outcome(job)}</p>`;
}

const secondsUntil = (moment) => Math.ceil(((moment ?? 0) - now()) / 1000);

/** How long something has lasted, as "7 s" or "2 min 5 s". */
function elapsed(since) {
    const seconds = Math.max(0, Math.floor((now() - since) / 1000));
    return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

function logBox(title, log) {
    const text = logLines(log ?? "").slice(-LINES).join("\n");
    if (text === "") return nothing;
    // The style turns it around, so that its end is in sight.
    return html`<div class="status-log" role="region" aria-label=${title} tabindex="0"><pre>${text}</pre></div>`;
}

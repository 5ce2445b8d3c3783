/**
 * How the server is and what is being drawn, in words. Views of the state alone.
 */

import { token } from "./api.js";
import { checkNow, useToken } from "./connection.js";
import { cancelAll, cancelJob, current, outcome } from "./jobs.js";
import { now, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

const LINES = 400; // of a log

const WORDS = {
    connecting: "Connecting",
    offline: "Offline",
    gone: "No answer",
    starting: "Starting",
    ready: "Ready",
    drawing: "Drawing",
    busy: "Busy",
    "setup-failed": "Setup failed",
    unhealthy: "Unhealthy",
    unauthorised: "Token wanted",
};

/** The state of the server in a word, for the header. */
export function connectionView() {
    const { kind } = state.connection;
    const draws = ["ready", "busy"].includes(kind) && state.jobs.some((job) => job.status === "drawing");
    const shown = draws ? "drawing" : kind;
    return html`
        <span class="status-pill" role="status" data-kind=${shown}>${WORDS[shown]}</span>
        ${token() && kind !== "unauthorised" ? forgetButton() : nothing}
    `;
}

/** What keeps from drawing, and what can be done; nothing when all is well. */
export function statePanel() {
    const { kind, sentence, log, since, until } = state.connection;
    switch (kind) {
        case "connecting":
            return panel("Connecting to the server", unknownBar("Connecting"));
        case "starting":
            return panel(
                "The server is starting",
                html`
                    ${unknownBar("Starting")}
                    <p class="quiet">Its models have been loading for ${elapsed(since)}; the page goes on by itself.</p>
                    ${logBox("Log of the setup", log)}
                `,
            );
        case "setup-failed":
            return panel(
                "The server could not be set up",
                html`<p class="problem">${sentence}</p>
                    ${logBox("Log of the setup", log)}`,
            );
        case "unhealthy":
            return panel(
                "The server cannot draw now",
                html`<p class="problem">${sentence}</p>
                    <p class="quiet">The page goes on as soon as it can again.</p>`,
            );
        case "offline":
            return panel("This computer is offline", html`<p>${sentence}</p> ${nextTry(until)}`);
        case "gone":
            return panel("The server does not answer", html`<p>${sentence}</p> ${nextTry(until)}`);
        case "unauthorised":
            return panel("A token is wanted", tokenForm(sentence));
    }
    return nothing;
}

/** What is drawn and what waits; when nothing does, how the last drawing ended. Always as high. */
export function progressView() {
    if (!state.schema && state.jobs.length === 0) return nothing;
    const job = current();
    const last = state.jobs.findLast(({ kind }) => kind === "draw");
    return html`
        <section class="status-progress" aria-label="Progress">${job ? running(job) : ended(last)}</section>
    `;
}

/** The log of what is drawn, or was drawn last. */
export function logView() {
    const box = logBox("Log", (current() ?? state.jobs.at(-1))?.log);
    return box === nothing ? html`<p class="quiet">Nothing has been said yet.</p>` : box;
}

function panel(title, content) {
    return html`<section class="panel stack" aria-label=${title}><h2>${title}</h2>${content}</section>`;
}

function nextTry(until) {
    const seconds = secondsUntil(until);
    return html`
        <div class="row">
            <button class="button" type="button" @click=${checkNow}>Try now</button>
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

const forgetButton = () =>
    html`<button class="button quiet" type="button" @click=${() => useToken("")}>Forget token</button>`;

/** A bar without an end in sight. */
const unknownBar = (name) => html`<progress class="status-unknown" aria-label=${name}></progress>`;

function running(job) {
    const known = job.status === "drawing" && job.of !== null;
    const more = counted("drawing") - (job.status === "drawing" ? 1 : 0);
    return html`
        <div class="status-line">
            <p>
                ${job.status === "waiting" ? waiting(job) : drawing(job)}
                <span class="quiet">${more > 0 ? `${more} more drawn beside it.` : nothing}</span>
            </p>
            ${counted("drawing", "waiting", "queued") > 1
                ? html`<button class="button quiet" type="button" @click=${() => cancelAll()}>Cancel all</button>`
                : nothing}
            <button class="button" type="button" @click=${() => cancelJob(job)}>Cancel</button>
        </div>
        ${known
            ? html`<progress aria-label="Drawing" max=${job.of} value=${job.at}></progress>`
            : unknownBar(job.status === "waiting" ? "Waiting" : "Drawing")}
    `;
}

function drawing({ at, of, startedAt }) {
    const waits = counted("waiting", "queued");
    const facts = [elapsed(startedAt), waits > 0 && waitHere(waits)].filter(Boolean).join(" · ");
    const silent = state.about?.progress === null ? "This server does not tell its steps." : "";
    return html`
        <span class="status-digits">${of === null ? "Drawing" : `Step ${at} of ${of}`}</span>
        <span class="quiet status-digits">${facts}</span>
        <span class="quiet">${silent}</span>
    `;
}

/** Why it waits, and who else does; where the server is full, for how long. */
function waiting({ error, until }) {
    if (!["ready", "busy"].includes(state.connection.kind)) return "Waiting until the server can draw.";
    const waits = counted("waiting", "queued");
    const others = waits > 1 ? `: ${waitHere(waits)}.` : ".";
    const next = state.about.server === "cog" ? "; yours is next" : "";
    if (until === null) return `${error.replace(/\.$/, "")}${next}${others}`;
    const again = `Asked again in ${Math.max(1, secondsUntil(until))} s${others}`;
    return html`${error} <span class="quiet status-digits">${again}</span>`;
}

const waitHere = (count) => (count === 1 ? "1 waits here" : `${count} wait here`);

/** How many jobs have any of these states. */
const counted = (...statuses) => state.jobs.filter(({ status }) => statuses.includes(status)).length;

function ended(job) {
    switch (job?.status) {
        case undefined:
            return html`<p class="quiet">Nothing is being drawn.</p>`;
        case "failed":
            return html`<p class="problem">${job.error}</p>`;
        case "canceled":
            return html`<p class="quiet">${job.error ?? "Cancelled."}</p>`;
    }
    return html`<p class="quiet">${outcome(job)}</p>`;
}

const secondsUntil = (moment) => Math.ceil(((moment ?? 0) - now()) / 1000);

/** How long something has lasted, as "7 s" or "2 min 5 s". */
function elapsed(since) {
    const seconds = Math.max(0, Math.floor((now() - since) / 1000));
    return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

function logBox(title, log) {
    const lines = linesOf(log ?? "");
    if (lines.length === 0) return nothing;
    // Turned around by the style, so that the end is in sight.
    const text = lines.join("\n");
    return html`<div class="status-log" role="region" aria-label=${title} tabindex="0"><pre>${text}</pre></div>`;
}

/** What a predictor has printed: of a bar its last state, and nothing that the server says of itself. */
function linesOf(log) {
    return log
        .split("\n")
        .map((line) => line.split("\r").filter(Boolean).at(-1) ?? "")
        .map((line) => line.replace(/^\[coglet::setup\] /, "")) // the predictor's, as Cog's health has it
        .filter((line) => line && !line.startsWith("[coglet"))
        .slice(-LINES);
}

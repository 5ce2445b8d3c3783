/**
 * Checks the server: whether it answers, what it is, and which inputs it has.
 *
 * One check at a time and one timer. A check asks for the server's health, and for what is not known yet.
 */

import { about, health, loras, openapi, setToken, setupLog, token, unauthorised } from "./api.js";
import { healthFailure, setupFailure, textOf } from "./cog.js";
import { readSchema } from "./schema.js";
import { change, changed, note, now, state } from "./store.js";

const CALM_MS = 3000; // between checks while the server is ready, or does not answer
const ALERT_MS = 1000; // while that may change soon; also how often a countdown ticks
const HIDDEN_MS = 10_000; // while the page is hidden
const BRIEF_MS = 2000; // a single check that fails within this time is not shown

let timer = null;
let checking = false;
let again = false; // whether to check once more when the check that runs has ended
let silentSince = null; // when the first check began that was not answered; null while they are
let busyLooks = 0; // checks in a row that found the slot taken by another client
let learnt = null; // the token with which schema and library were read; null before that
let refused = null; // the token that was refused

export const canDraw = () => ["ready", "busy"].includes(state.connection.kind);

/** Check from now on. */
export function watch() {
    window.addEventListener("online", checkNow);
    window.addEventListener("offline", checkNow);
    document.addEventListener("visibilitychange", () => {
        if (!document.hidden) checkNow();
    });
    checkNow();
}

/** Check at once, and go on from there. */
export async function checkNow() {
    again = checking;
    if (checking) return;
    checking = true;
    clearTimeout(timer);
    try {
        await check();
    } finally {
        checking = false;
        timer = again ? setTimeout(checkNow) : setTimeout(wake, pauseLength());
    }
}

/** Send this token from now on, and see whether the server takes it; "" forgets the one that was kept. */
export function useToken(text) {
    setToken(text);
    refused = learnt = null;
    checkNow();
}

/** A request with this token was refused; meanwhile another one may have been entered. */
export function refuseToken(text) {
    refused = text;
    checkNow();
}

/** Tick while a countdown, which ends at `until`, is shown; then check. */
function wake() {
    if ((state.connection.until ?? 0) - now() > ALERT_MS / 2) {
        changed();
        timer = setTimeout(wake, ALERT_MS);
    } else {
        checkNow();
    }
}

function pauseLength() {
    if (document.hidden) return HIDDEN_MS;
    return state.connection.kind === "ready" && silentSince === null && busyLooks === 0 ? CALM_MS : ALERT_MS;
}

async function check() {
    const began = now();
    try {
        if (learnt === null) state.about = await about();
        const told = await judge(await health());
        silentSince = null;
        show(told);
    } catch (error) {
        if (error.kind === "unauthorised") {
            refused = error.token;
            silentSince = null;
            if (refused === token()) show({ kind: "unauthorised", sentence: error.message });
            return;
        }
        if (error.kind === undefined) console.error(error); // a bug, which is shown like a refusal
        const brief = silentSince === null && now() - began < BRIEF_MS;
        silentSince ??= began;
        if (brief) return;
        learnt = refused = null; // another server may come back
        const until = now() + (error.seconds ?? CALM_MS / 1000) * 1000;
        const silent = navigator.onLine ? "gone" : "offline";
        const kind = error.kind === "gone" ? silent : "unhealthy"; // a server that refuses is there all the same
        show({ kind, sentence: error.message, since: silentSince, until });
    }
}

/** The state of a server by its health. */
async function judge({ status, setup, user_healthcheck_error: fault }) {
    // The slot is freed a moment after our own answer, so only two checks in a row tell of another client.
    const ours = state.jobs.some((job) => job.status === "drawing");
    busyLooks = status === "BUSY" && !ours ? busyLooks + 1 : 0;
    if (status === "STARTING") {
        learnt = null;
        return { kind: "starting", log: await startLog(), since: Date.parse(setup?.started_at) || undefined };
    }
    if (status === "SETUP_FAILED") {
        const logs = textOf(setup?.logs);
        const log = (await startLog()) || logs;
        const why = log ? "Its log says why." : "The server does not say why.";
        return { kind: "setup-failed", sentence: setupFailure(logs) || why, log };
    }
    if (["UNHEALTHY", "DEFUNCT"].includes(status)) {
        return { kind: "unhealthy", sentence: healthFailure(textOf(fault)) };
    }
    if (!["READY", "BUSY"].includes(status)) {
        return { kind: "unhealthy", sentence: "The server does not say whether it can draw." };
    }
    if (token() === refused || (state.about.tokens && !token())) throw unauthorised(token());
    if (learnt !== token() && !(await learn())) {
        return { kind: "unhealthy", sentence: "What the server says of its inputs cannot be read." };
    }
    return { kind: busyLooks > 1 ? "busy" : "ready" };
}

/** Read the schema and the library; false if the document is not a Cog server's. */
async function learn() {
    const asked = token();
    const [said, names] = await Promise.all([openapi(), libraryNames()]);
    try {
        state.schema = readSchema(said);
    } catch {
        return false;
    }
    state.library = names;
    learnt = asked;
    return true;
}

/** The names of the library's LoRAs; if they cannot be read, a note says so, and the page goes on without. */
async function libraryNames() {
    try {
        return await loras();
    } catch (error) {
        if (error.kind === "unauthorised") throw error;
        note(error.message);
        return [];
    }
}

/** The log of the setup, which the page's server has if it has started the predictor itself. */
const startLog = async () => (state.about.log ? setupLog().catch(() => "") : "");

/** Show a state; `since` is when it began, by default when it was first shown. */
function show({ kind, sentence = "", log = "", since, until = null }) {
    const before = state.connection;
    since ??= before.kind === kind ? before.since : now();
    change(state, { connection: { kind, sentence, log, since, until } });
}

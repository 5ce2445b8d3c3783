/**
 * The queue of what is drawn: beside a Cog server one at a time, at a front some at once.
 */

import { cancel, draw, pause } from "./api.js";
import { checkNow, refuseToken } from "./connection.js";
import { focusProblem } from "./form.js";
import { keep } from "./history.js";
import { rememberLoras } from "./loras.js";
import { encode, fromDataUri, shortened } from "./recipe.js";
import { announce, changed, now, state } from "./store.js";

const AT_ONCE_AT_A_FRONT = 4;
const KEPT = 100; // jobs that have ended
const SECONDS_TO_ASK_AGAIN = 5; // where the server does not say how many
const TICK_MS = 1000;
// How long to wait after 409. The slot of a prediction that has just ended is free within milliseconds, that of a
// cancelled one after its next step: so the first waits are short, and nobody is told of them.
const BUSY_MS = [50, 200, 1000];
const ACCEPTED_MS = 500; // a request that is not refused for so long is being drawn

const SUFFIXES = { "image/jpeg": "jpg" };

const controllers = new WeakMap(); // of a job, the AbortController
const finishers = new WeakMap(); // of a job, what resolves `done`
let clock = null;

/**
 * Draw, after what is drawn already.
 *
 * @param {Recipe} recipe its files are read when its turn comes
 * @param {"draw"|"cell"} kind a cell's pictures go to the grid alone
 * @returns {Job}
 */
export function enqueue(recipe, kind = "draw") {
    const job = {
        id: newId(),
        recipe,
        kind,
        status: "queued",
        at: null,
        of: null,
        log: "",
        error: null,
        until: null,
        startedAt: null,
        endedAt: null,
        request: null,
        answer: null,
        pictures: [],
        dropped: 0,
    };
    job.done = new Promise((resolve) => finishers.set(job, () => resolve(job)));
    controllers.set(job, new AbortController());
    if (kind === "draw") state.problems = {};
    state.jobs = [...state.jobs.filter(hasEnded).slice(-KEPT), ...state.jobs.filter((other) => !hasEnded(other)), job];
    advance();
    return job;
}

/** Cancel a job, here and on the server. */
export function cancelJob(job) {
    if (hasEnded(job)) return;
    const asked = job.status !== "queued";
    end(job, "canceled");
    controllers.get(job).abort();
    if (asked) cancel(job.id).catch(() => {}); // it has ended by itself, or nobody answers
    advance();
}

/** Cancel all jobs, or all of a kind. */
export function cancelAll(kind = null) {
    // The queue first: else the next one begins.
    const jobs = state.jobs.filter((job) => !hasEnded(job) && (kind === null || job.kind === kind));
    jobs.reverse().forEach(cancelJob);
}

/** @returns {Job|undefined} the one that is drawn, else the one that is asked for again. */
export function current() {
    return state.jobs.find((job) => job.status === "drawing") ?? state.jobs.find(isAsked);
}

/** What a job that succeeded has brought, in a sentence or two. */
export function outcome({ pictures, dropped, startedAt, endedAt }) {
    const count = pictures.length === 1 ? "1 picture" : `${pictures.length} pictures`;
    const drawn = `${count} drawn in ${((endedAt - startedAt) / 1000).toFixed(1)} seconds.`;
    return dropped > 0 ? `${drawn} The safety check kept ${dropped} of ${dropped + pictures.length} back.` : drawn;
}

// A page that is closed has no use for what it drew.
window.addEventListener("pagehide", () => cancelAll());

const isAsked = (job) => job.status === "drawing" || job.status === "waiting";
const hasEnded = (job) => !isAsked(job) && job.status !== "queued";

/** An id that nobody can guess. `crypto.randomUUID` is missing where a page came over HTTP from another machine. */
function newId() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Begin what can be begun, and keep the clock going while something is. */
function advance() {
    const room = state.about?.server === "front" ? AT_ONCE_AT_A_FRONT : 1;
    const free = room - state.jobs.filter(isAsked).length;
    state.jobs
        .filter((job) => job.status === "queued")
        .slice(0, Math.max(0, free))
        .forEach(run);
    clearInterval(clock);
    if (state.jobs.some(isAsked)) clock = setInterval(changed, TICK_MS);
    changed();
}

function begin(job) {
    Object.assign(job, { status: "drawing", error: null, until: null, at: null, of: null, startedAt: now() });
    changed();
}

function end(job, status, error = null) {
    Object.assign(job, { status, error, until: null, endedAt: now() });
    finishers.get(job)();
}

/** Everything from a job's turn to its end; never rejects. */
async function run(job) {
    const { signal } = controllers.get(job);
    begin(job);
    try {
        if (state.schema === null) throw new Error("The server has not told its inputs yet.");
        const input = await encode(job.recipe, state.schema.fields);
        job.request = shortened({ input });
        const answer = await drawWhenPossible(job, input, signal);
        signal.throwIfAborted();
        job.answer = shortened(answer);
        take(job, answer);
    } catch (error) {
        if (!signal.aborted) fail(job, error);
    }
    checkNow();
    advance();
}

/** Ask until the server has drawn; whoever waits is told for what, in `error`. */
async function drawWhenPossible(job, input, signal) {
    for (let refusals = 0; ; refusals++) {
        let begun;
        try {
            // While others have the slot, it is refused within milliseconds, and goes on waiting.
            if (job.status === "waiting") begun = setTimeout(() => isAsked(job) && begin(job), ACCEPTED_MS);
            job.until = null;
            return await draw(job.id, input, state.about, { signal, onProgress: (told) => follow(job, told) });
        } catch (error) {
            if (signal.aborted || !["busy", "later"].includes(error.kind)) throw error;
            clearTimeout(begun);
            const seconds = Math.max(1, error.seconds ?? SECONDS_TO_ASK_AGAIN);
            const wait = error.kind === "busy" ? BUSY_MS[Math.min(refusals, BUSY_MS.length - 1)] : seconds * 1000;
            if (wait >= TICK_MS) {
                const until = error.kind === "later" ? now() + wait : null; // no countdown of a single second
                Object.assign(job, { status: "waiting", error: error.message, until });
                changed();
            }
            await pause(wait, signal);
        } finally {
            clearTimeout(begun);
        }
    }
}

/** What is told while it is drawn. A bar says `| 19/40 [`; the last one counts. */
function follow(job, { status, logs }) {
    if (!isAsked(job)) return;
    if (status === "starting" && state.about.server === "front") {
        Object.assign(job, { status: "waiting", error: "Every worker is busy." });
        changed();
        return;
    }
    if (job.status === "waiting") begin(job);
    job.log = textOf(logs) || job.log;
    const steps = [...job.log.matchAll(/\|\s*(\d+)\/(\d+) \[/g)].at(-1);
    if (steps) [job.at, job.of] = [Number(steps[1]), Number(steps[2])];
    changed();
}

/** The end that the server tells. */
function take(job, answer) {
    job.log = textOf(answer.logs) || job.log; // where there is no output, Cog leaves the log out
    if (answer.status === "canceled") {
        end(job, "canceled", "The server has cancelled the prediction.");
        return;
    }
    if (answer.status !== "succeeded") {
        end(job, "failed", failure(answer));
        return;
    }
    const metrics = readMetrics(answer.metrics);
    job.pictures = picturesOf(job, answer.output, metrics);
    job.dropped = metrics.safety.dropped.length;
    if (job.pictures.length === 0) {
        end(job, "failed", "The server sent no picture.");
        return;
    }
    end(job, "succeeded");
    rememberLoras(job);
    if (job.kind === "draw") present(job, metrics.seed);
}

function present(job, seed) {
    state.pictures = [...job.pictures, ...state.pictures];
    state.selected = job.pictures[0].id;
    const wanted = state.seedLocked && state.inputs.seed === undefined;
    if (wanted && seed !== null) state.inputs = { ...state.inputs, seed };
    keep(job.pictures);
    announce(outcome(job));
}

/** What is shown of an answer's metrics, each of its type: another server may say anything there, or nothing. */
function readMetrics(metrics) {
    const { seed, seeds, safety, loras, predict_time: seconds, ...others } = metrics ?? {};
    const list = (value) => (Array.isArray(value) ? value : []);
    const seedOf = (value) => (Number.isSafeInteger(value) ? value : null);
    return {
        ...others,
        seed: seedOf(seed),
        seeds: list(seeds).map(seedOf),
        safety: { dropped: list(safety?.dropped) },
        loras: list(loras).filter((lora) => typeof lora?.path === "string"),
        predict_time: Number.isFinite(seconds) ? seconds : null,
    };
}

const textOf = (value) => (typeof value === "string" ? value : "");

/** The pictures of an answer. Those that the safety check kept back have a seed, and no file. */
function picturesOf(job, output, metrics) {
    const { seeds: all, safety, loras } = metrics;
    const seeds = all.filter((_, index) => !safety.dropped.includes(index));
    const files = [output].flat().filter((item) => textOf(item).startsWith("data:image/"));
    return files.map((file, index) => {
        const blob = fromDataUri(file);
        const seed = seeds[index] ?? null;
        const suffix = SUFFIXES[blob.type] ?? blob.type.split("/").at(-1);
        return {
            id: `${job.id}.${index}`,
            blob,
            type: blob.type,
            name: `flux-${seed ?? job.id}.${suffix}`,
            seed,
            recipe: alone(job.recipe, seed),
            loras,
            metrics,
            log: job.log,
            at: Date.now(),
        };
    });
}

/** The recipe of one picture out of several. */
function alone({ inputs, loras }, seed) {
    return { inputs: { ...inputs, ...(seed === null ? {} : { seed, num_outputs: 1 }) }, loras };
}

/** Why there is no answer. */
function fail(job, error) {
    if (error.kind === "unauthorised") refuseToken();
    end(job, "failed", error.message);
    if (error.kind === "invalid" && job.kind === "draw") {
        state.problems = error.problems;
        changed();
        queueMicrotask(focusProblem); // after the page is rendered
    }
    announce(error.message);
}

/** The server's reason, without the names of the layers that it came through. */
function failure({ error }) {
    const reason = (textOf(error) || "The server gave no reason.").replace(/^(Prediction failed: )*(\w+Error: )?/, "");
    return /[.!?]$/.test(reason) ? reason : `${reason}.`;
}

/**
 * The queue of drawings: at a Cog server one at a time, at a front some at once. It does nothing with a job that has
 * ended; its caller does.
 */

import { cancel, draw, pause } from "./api.js";
import { drawingFailure, textOf } from "./cog.js";
import { checkNow, refuseToken } from "./connection.js";
import { fieldNamed, withoutSecrets } from "./schema.js";
import { change, changed, now, state } from "./store.js";
import { encode, fromDataUri, shortened } from "./wire.js";

const AT_ONCE_AT_A_FRONT = 4;
const KEPT = 100; // jobs that have ended
const SECONDS_TO_ASK_AGAIN = 5; // where the server does not say how many
const TICK_MS = 1000;
// Waits after each 409 in a row. A prediction that has just ended frees its slot within milliseconds, a cancelled one
// after its next step: so the first waits are short, and not shown.
const BUSY_MS = [50, 200, 1000];
const ACCEPTED_MS = 500; // a request that is not refused for so long is being drawn

let clock = null;

/** @returns {Job} one prediction, the last in the queue. Its moments are in ms since the epoch, by `now`. */
export function enqueue(recipe, kind = "draw") {
    const { promise, resolve } = Promise.withResolvers();
    const job = {
        id: newId(), // of the prediction
        recipe, // its files are read when its turn comes
        kind, // "draw": of the form, or "cell": of a grid
        status: "queued", // then "drawing", or "waiting" for the server; "succeeded", "failed" or "canceled"
        at: null, // steps that are done, once the server has told them
        of: null, // steps in all
        log: "", // what the predictor has printed
        error: null, // the sentence on why it waits, failed or was cancelled
        problems: {}, // by input, the server's sentence on it
        until: null, // when it is asked for again, where the server said when
        startedAt: null, // when the server began with it
        endedAt: null,
        answer: null, // as JSON, its data URIs cut
        pictures: [],
        abort: new AbortController(), // breaks its requests off
        done: promise, // of the job itself, once it has ended, however it does
        resolve,
    };
    state.jobs = [...state.jobs.filter(hasEnded).slice(-KEPT), ...state.jobs.filter((other) => !hasEnded(other)), job];
    advance();
    return job;
}

/** Cancel jobs, here and on the server; those that have ended stay as they are. */
export function cancelJobs(jobs) {
    const unended = jobs.filter((job) => !hasEnded(job));
    const asked = unended.filter(isAsked);
    for (const job of unended) end(job, "canceled"); // all of them, before the next one begins
    for (const job of unended) job.abort.abort();
    for (const job of asked) dismiss(job);
    advance();
}

export const cancelAll = () => cancelJobs(state.jobs);

/** @returns {Job|undefined} the one that is drawn, else the one that waits for the server. */
export const current = () => state.jobs.find((job) => job.status === "drawing") ?? state.jobs.find(isAsked);

/** Whether a job has succeeded, failed or been cancelled. */
export const hasEnded = (job) => !isAsked(job) && job.status !== "queued";

/** The result of a job that succeeded, in a sentence or two. */
export function outcome({ pictures, startedAt, endedAt }) {
    const dropped = pictures[0].metrics.safety.dropped.length;
    const count = pictures.length === 1 ? "1 picture" : `${pictures.length} pictures`;
    const drawn = `${count} drawn in ${((endedAt - startedAt) / 1000).toFixed(1)} seconds.`;
    return dropped > 0 ? `${drawn} The safety check kept ${dropped} of ${dropped + pictures.length} back.` : drawn;
}

const isAsked = (job) => job.status === "drawing" || job.status === "waiting";

/** An id that nobody can guess. `crypto.randomUUID` is missing where a page came over HTTP from another machine. */
function newId() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Begin the jobs for which there is room, and keep the clock going while one runs or waits for the server. */
function advance() {
    const room = state.about?.server === "front" ? AT_ONCE_AT_A_FRONT : 1;
    const free = room - state.jobs.filter(isAsked).length;
    const queued = state.jobs.filter((job) => job.status === "queued");
    queued.slice(0, Math.max(0, free)).forEach(run);
    clearInterval(clock);
    if (state.jobs.some(isAsked)) clock = setInterval(changed, TICK_MS);
    changed();
}

function begin(job) {
    change(job, { status: "drawing", error: null, until: null, at: null, of: null, startedAt: now() });
}

function end(job, status, error = null) {
    Object.assign(job, { status, error, until: null, endedAt: now() });
    job.resolve(job);
}

/** Have the server cancel a job; the job may have ended by itself, or the server may not answer. */
const dismiss = (job) => cancel(job.id).catch(() => {});

/** Everything from a job's turn to its end; never rejects. */
async function run(job) {
    const { signal } = job.abort;
    begin(job);
    try {
        const input = await encode(job.recipe, state.schema.fields);
        signal.throwIfAborted();
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

/** Ask until the server has drawn; while the job waits, its `error` says why. */
async function drawWhenPossible(job, input, signal) {
    for (let refusals = 0; ; refusals++) {
        let begun, refusal;
        // If the slot is taken, the answer comes within milliseconds, and the job goes on waiting.
        if (job.status === "waiting") begun = setTimeout(() => isAsked(job) && begin(job), ACCEPTED_MS);
        job.until = null;
        try {
            return await draw(job.id, input, state.about, { signal, onProgress: (told) => follow(job, told) });
        } catch (error) {
            if (signal.aborted || !["busy", "later"].includes(error.kind)) throw error;
            refusal = error;
        } finally {
            clearTimeout(begun);
        }
        const isBusy = refusal.kind === "busy";
        const seconds = Math.max(1, refusal.seconds ?? SECONDS_TO_ASK_AGAIN);
        const wait = isBusy ? BUSY_MS[Math.min(refusals, BUSY_MS.length - 1)] : seconds * 1000;
        if (wait >= TICK_MS) {
            const until = isBusy ? null : now() + wait; // no countdown of a single second
            change(job, { status: "waiting", error: refusal.message, until });
        }
        await pause(wait, signal);
    }
}

/** Take the log of a job while it is drawn. A bar in it says `| 19/40 [`; the last one counts. */
function follow(job, { status, logs }) {
    if (!isAsked(job)) return;
    if (status === "starting" && state.about.server === "front") {
        return change(job, { status: "waiting", error: "Every worker is busy." });
    }
    if (job.status === "waiting") begin(job);
    job.log = textOf(logs) || job.log;
    const steps = [...job.log.matchAll(/\|\s*(\d+)\/(\d+) \[/g)].at(-1);
    if (steps) [job.at, job.of] = [Number(steps[1]), Number(steps[2])];
    changed();
}

/** End a job as the server's answer says. */
function take(job, answer) {
    job.log = textOf(answer.logs) || job.log; // where there is no output, Cog leaves the log out
    if (answer.status === "canceled") return end(job, "canceled", "The server has cancelled the prediction.");
    if (answer.status !== "succeeded") return end(job, "failed", drawingFailure(textOf(answer.error)));
    const items = [answer.output].flat().map(textOf);
    job.pictures = picturesOf(job, items, readMetrics(answer.metrics));
    if (job.pictures.length > 0) return end(job, "succeeded");
    const isAddress = items.some((item) => /^https?:/.test(item));
    const unfetched = "The server answered with an address instead of a picture, which this page does not fetch.";
    end(job, "failed", isAddress ? unfetched : "The server sent no picture.");
}

/** An answer's metrics, those that the page uses of their types: another server may say anything there, or nothing. */
function readMetrics(metrics) {
    const { seed, seeds, safety, loras, predict_time: seconds, ...others } = metrics ?? {};
    const list = (value) => (Array.isArray(value) ? value : []);
    const seedOf = (value) => (Number.isSafeInteger(value) ? value : null);
    return {
        ...others,
        seed: seedOf(seed),
        seeds: list(seeds).map(seedOf), // of all pictures
        safety: { dropped: list(safety?.dropped) }, // the places of those that were kept back
        loras: list(loras).filter((lora) => typeof lora?.path === "string"),
        predict_time: Number.isFinite(seconds) ? seconds : null,
    };
}

/** The pictures of an output. Those that the safety check kept back have a seed, but no file. */
function picturesOf(job, items, metrics) {
    const { seeds: all, safety, loras } = metrics;
    const seeds = all.filter((_, index) => !safety.dropped.includes(index));
    const files = items.filter((item) => item.startsWith("data:image/"));
    return files.map((file, index) => {
        const blob = fromDataUri(file);
        const seed = seeds[index] ?? null;
        const suffix = blob.type.replace(/.*\//, "").replace(/^jpeg$/, "jpg");
        return {
            id: `${job.id}.${index}`,
            blob, // its bytes as they came
            name: `flux-${seed ?? job.id}.${suffix}`,
            seed, // null where the server does not tell it
            recipe: alone(job.recipe, seed),
            loras, // {path, scale, name} of each, as the server tells of them
            metrics, // of its job
            at: Date.now(),
        };
    });
}

/** The recipe that draws one picture of several, without secrets. */
function alone({ inputs, loras }, seed) {
    const { fields } = state.schema;
    const its = Object.entries(seed === null ? {} : { seed, num_outputs: 1 });
    const known = Object.fromEntries(its.filter(([name]) => fieldNamed(fields, name)));
    return { inputs: { ...withoutSecrets(inputs, fields), ...known }, loras };
}

/** End a job that has no answer. */
function fail(job, error) {
    if (error.kind === "unauthorised") refuseToken(error.token);
    if (error.kind === "gone") dismiss(job); // else a cluster would go on drawing it
    job.problems = error.problems ?? {};
    const labelOf = (name) => fieldNamed(state.schema.fields, name)?.label ?? name;
    const sentences = Object.entries(job.problems).map(([name, sentence]) => `${labelOf(name)}: ${sentence}`);
    end(job, "failed", sentences.join(" ") || error.message);
}

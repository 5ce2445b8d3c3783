/**
 * Texts of Cog and of a predictor, as people read them: the reason alone, without the layers' names in front of it.
 * Pure: no page, no state.
 */

/** Why nothing can be drawn once the predictor's process is gone. */
const PREDICTOR_ENDED = "The predictor's process has ended; its server has to be started again.";

const NO_PROCESS = /^(Worker crashed|Failed to send request: )/;
const SETUP = /^((worker (initialization|setup) failed( \(slot [\w-]+\))?|setup failed): )+(\w+Error: )?/i;
// Lines about Cog's own work: with its name in front, or without, where the page's server has read Cog's own log.
const COGS = /^(\[coglet|predict\(\) is deprecated; use run\(\) instead$|Setup failed$)/;

/** A value if it is a text, else "": another server may answer with anything. */
export const textOf = (value) => (typeof value === "string" ? value : "");

/** A sentence with its end. */
export const finished = (sentence) => (/[.!?…]$/.test(sentence) ? sentence : `${sentence}.`);

/** Why the setup failed, by the log of it; "" where that does not say. */
export function setupFailure(log) {
    const line = lines(log).findLast((line) => SETUP.test(line));
    return line ? finished(line.replace(SETUP, "").trim()) : "";
}

/** Why the predictor is unhealthy, by the error of its health check. */
export function healthFailure(fault) {
    if (fault === "healthcheck timed out") return "The predictor does not answer the server.";
    const nobodyAsked = !fault || fault.startsWith("Healthcheck error: ");
    return nobodyAsked ? PREDICTOR_ENDED : fault.replace(/^Healthcheck failed: (\w+Error: )?/, "");
}

export function drawingFailure(error) {
    const reason = error.replace(/^(Prediction failed: )*(\w+Error: )?/, "");
    if (NO_PROCESS.test(reason)) return PREDICTOR_ENDED;
    return finished(reason || "The server gave no reason");
}

/** The lines that a predictor has printed: the last state of each bar, and none of Cog's own. */
export function logLines(log) {
    return lines(log)
        .map((line) => line.replace(/^\[coglet::setup\] /, "").replace(SETUP, ""))
        .filter((line) => line && !COGS.test(line));
}

const lines = (log) => log.split("\n").map((line) => line.split("\r").filter(Boolean).at(-1) ?? "");

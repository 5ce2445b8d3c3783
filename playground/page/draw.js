/** Draw a recipe; then show, keep and announce its pictures, or mark the inputs that the server refuses. */

import { afterRender } from "./browser.js";
import { snapshot } from "./field.js";
import { focusProblem } from "./form.js";
import { keep } from "./history.js";
import { enqueue, outcome } from "./jobs.js";
import { LORAS } from "./lora.js";
import { rememberLoras } from "./loras.js";
import { isSame } from "./schema.js";
import { announce, comparedPicture, state } from "./store.js";

/** Have a recipe drawn, after the jobs that wait already. */
export async function draw(recipe) {
    const job = await enqueue(recipe).done;
    if (job.status === "succeeded") present(job);
    if (job.status === "failed") refuse(job);
}

/** Put its pictures first, and the first of them into the stage, unless the one there is being compared. */
function present(job) {
    state.pictures = [...job.pictures, ...state.pictures];
    if (!comparedPicture() && !state.picking) state.selected = job.pictures[0].id;
    const { seed } = job.pictures[0].metrics;
    if (state.seedLocked && state.inputs.seed === undefined && seed !== null) state.inputs = { ...state.inputs, seed };
    keep(job.pictures);
    rememberLoras(job);
    announce(outcome(job));
}

/** Show the server's problems at their inputs, where the form still has the values that were refused. */
function refuse({ recipe, problems, error }) {
    const form = snapshot();
    const still = Object.entries(problems).filter(([name]) => isSame(partOf(form, name), partOf(recipe, name)));
    announce(error);
    if (still.length === 0) return;
    state.problems = { ...state.problems, ...Object.fromEntries(still) };
    // The focus stays with a person who has gone on to something else.
    const { activeElement } = document;
    if (activeElement === document.body || activeElement.matches("[type=submit][form=form]")) afterRender(focusProblem);
}

/** The value of an input in a recipe; of the list of LoRAs, their paths and scales. */
function partOf({ inputs, loras }, name) {
    return name === LORAS ? loras.map(({ path, scale }) => [path, scale]) : inputs[name];
}

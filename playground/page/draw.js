/**
 * Draw a recipe, and do with what comes of it what a person expects: it is shown, kept and told.
 */

import { afterRender } from "./browser.js";
import { comparedPicture, isPicking } from "./compare.js";
import { focusProblem } from "./form.js";
import { keep } from "./history.js";
import { enqueue, outcome } from "./jobs.js";
import { LORAS } from "./lora.js";
import { rememberLoras } from "./loras.js";
import { snapshot } from "./recipe.js";
import { isSame } from "./schema.js";
import { announce, state } from "./store.js";

/**
 * Have a recipe drawn, after what is drawn already.
 *
 * @param {Recipe} recipe
 * @returns {Promise<void>} settled once it has ended, however it does
 */
export async function draw(recipe) {
    const job = await enqueue(recipe).done;
    if (job.status === "succeeded") present(job);
    if (job.status === "failed") refuse(job);
}

/** Its pictures come first, and the first of them into the stage, unless one that is there is being compared. */
function present(job) {
    state.pictures = [...job.pictures, ...state.pictures];
    if (!comparedPicture() && !isPicking()) state.selected = job.pictures[0].id;
    const { seed } = job.pictures[0].metrics;
    if (state.seedLocked && state.inputs.seed === undefined && seed !== null) state.inputs = { ...state.inputs, seed };
    keep(job.pictures);
    rememberLoras(job);
    announce(outcome(job));
}

/** What the server says of inputs stands beside these, as long as the form has what it speaks of. */
function refuse({ recipe, problems, error }) {
    const form = snapshot();
    const isStill = ([name]) => isSame(valueOf(form, name), valueOf(recipe, name));
    const still = Object.entries(problems).filter(isStill);
    announce(error);
    if (still.length === 0) return;
    state.problems = { ...state.problems, ...Object.fromEntries(still) };
    // Who has gone on to something else meanwhile is left there.
    const { activeElement } = document;
    if (activeElement === document.body || activeElement.matches("[type=submit][form=form]")) afterRender(focusProblem);
}

/** What a recipe says for an input, to be compared. */
function valueOf({ inputs, loras }, name) {
    return name === LORAS ? loras.map(({ path, scale }) => [path, scale]) : inputs[name];
}

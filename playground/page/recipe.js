/**
 * The recipe of the form: taken out of it, and put back.
 */

import { isSecret } from "./schema.js";
import { changed, state } from "./store.js";

/** @returns {Recipe} of the form as it is now. */
export function snapshot() {
    return { inputs: { ...state.inputs }, loras: state.loras.map((lora) => ({ ...lora })) };
}

/** Put a recipe into the form. Secrets that were typed there stay, as recipes are kept without them. */
export function restore({ inputs, loras }) {
    const secrets = Object.entries(state.inputs).filter(([name]) => isSecret(name, state.schema.fields));
    state.inputs = { ...Object.fromEntries(secrets), ...inputs };
    state.loras = loras.map((lora) => ({ ...lora }));
    state.problems = {};
    changed();
}

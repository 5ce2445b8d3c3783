/**
 * A recipe in the page's address, `#prompt=a+red+fox&seed=7&replicate_weights=zorp*0.8`, a LoRA of the list in each
 * `replicate_weights`.
 *
 * Who opens a shared address sees the values in the form before anything is drawn. What could do harm all the same is
 * neither written nor read: a switched-off check, addresses of images, which a server would fetch, and secrets.
 */

import { isPrivate, loraProblem, LORAS, MOST_LORAS, readLora, writeLora } from "./lora.js";
import { accepts, fieldNamed, isGiven, meaningOf } from "./schema.js";

const UNSHARED = new Set(["disable_safety_checker", LORAS]); // the latter is the list's

/**
 * The address of a recipe, as far as it can be shared.
 *
 * @param {Recipe} recipe
 * @param {Field[]} fields of the schema
 * @returns {string} "#" and pairs of name and value
 */
export function toFragment({ inputs, loras }, fields) {
    const pairs = new URLSearchParams(Object.entries(inputs).filter(([name, value]) => isShared(name, value, fields)));
    for (const lora of loras.filter(isSharedLora)) pairs.append(LORAS, writeLora(lora));
    return `#${pairs}`;
}

/**
 * What `toFragment` leaves out.
 *
 * @param {Recipe} recipe
 * @param {Field[]} fields of the schema
 * @returns {string[]} names of inputs and of files; "a LoRA" for one by a private address or of a wrong strength
 */
export function unshared({ inputs, loras }, fields) {
    const given = Object.entries(inputs).filter(([, value]) => isGiven(value));
    const names = given.filter(([name, value]) => !isShared(name, value, fields)).map(([name]) => name);
    const others = loras.filter((lora) => !isSharedLora(lora));
    return [...names, ...others.map(({ path, file }) => (file ? path : "a LoRA"))];
}

/**
 * The recipe that an address holds. What is unknown, out of bounds or of the wrong type is left out.
 *
 * @param {string} hash of the address, with or without "#"
 * @param {Field[]} fields of the schema
 * @returns {Recipe|null} null where it holds nothing
 */
export function fromFragment(hash, fields) {
    const pairs = [...new URLSearchParams(hash.replace(/^#/, ""))];
    const known = pairs.flatMap(([name, text]) => {
        const field = fieldNamed(fields, name);
        return field ? [[name, meaningOf(field, text)]] : [];
    });
    const inputs = Object.fromEntries(known.filter(([name, value]) => isShared(name, value, fields)));
    const texts = pairs.filter(([name]) => name === LORAS && fieldNamed(fields, LORAS)).map(([, text]) => text);
    const loras = texts.map(readLora).filter(isSharedLora).slice(0, MOST_LORAS);
    return Object.keys(inputs).length + loras.length > 0 ? { inputs, loras } : null;
}

/** Whether an input is one that is shared: lists and objects, which may have anything in them, are not. */
function isShared(name, value, fields) {
    const field = fieldNamed(fields, name);
    const isPlain = ["string", "number", "boolean"].includes(typeof value);
    const isOpen = field && !field.secret && !UNSHARED.has(name) && accepts(field, value);
    return isOpen && isPlain && !isPrivate(String(value));
}

function isSharedLora(lora) {
    return !lora.file && loraProblem(lora) === null && !isPrivate(lora.path);
}

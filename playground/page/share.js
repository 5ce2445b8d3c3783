/**
 * A recipe in the page's address, `#prompt=a+red+fox&seed=7&replicate_weights=zorp*0.8`, a LoRA of the list in each
 * `replicate_weights`.
 *
 * A person who opens a shared address sees its values in the form before anything is drawn. Values that could do harm
 * are neither written nor read: a switched-off check, addresses of images, which a server would fetch, and secrets.
 */

import { isPrivate, loraProblem, LORAS, MOST_LORAS, readLora, writeLora } from "./lora.js";
import { accepts, fieldNamed, isGiven, meaningOf } from "./schema.js";

const UNSHARED = new Set(["disable_safety_checker", LORAS]); // the latter is the list's

/** The fragment "#…" of an address that holds a recipe, as far as it can be shared. */
export function toFragment({ inputs, loras }, fields) {
    const pairs = new URLSearchParams(Object.entries(inputs).filter(([name, value]) => isShared(name, value, fields)));
    for (const lora of loras.filter(isSharedLora)) pairs.append(LORAS, writeLora(lora));
    return `#${pairs}`;
}

/** What `toFragment` leaves out: names of inputs and files; "a LoRA" for a private address or a wrong strength. */
export function unshared({ inputs, loras }, fields) {
    const given = Object.entries(inputs).filter(([, value]) => isGiven(value));
    const names = given.filter(([name, value]) => !isShared(name, value, fields)).map(([name]) => name);
    const others = loras.filter((lora) => !isSharedLora(lora));
    return [...names, ...others.map(({ path, file }) => (file ? path : "a LoRA"))];
}

/** @returns {Recipe|null} of a fragment, without inputs that are unknown or wrong; null where nothing is left. */
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

/** Whether an input is shared: lists and objects, which may have anything in them, are not. */
function isShared(name, value, fields) {
    const field = fieldNamed(fields, name);
    const isPlain = ["string", "number", "boolean"].includes(typeof value);
    const isOpen = field && !field.secret && !UNSHARED.has(name) && accepts(field, value);
    return isOpen && isPlain && !isPrivate(String(value));
}

const isSharedLora = (lora) => !lora.file && loraProblem(lora) === null && !isPrivate(lora.path);

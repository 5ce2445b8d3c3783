/**
 * The bounds of a LoRA, its form as text, and which references are private. Pure: no page, no state.
 *
 * The bounds are the server's, so that it refuses nothing that is taken here.
 */

import { readNumber } from "./schema.js";

export const LORAS = "replicate_weights"; // the input that carries the list
export const MOST_LORAS = 8; // of one picture
export const SUFFIXES = [".safetensors", ".tar", ".tar.gz", ".tgz", ".zip"]; // of files of LoRAs
export const LARGEST_STRENGTH = 10; // in either direction

const LONGEST_REFERENCE = 8192; // characters
const LONGEST_SHOWN = 80; // characters of a reference within a sentence
// A data URI is private, and so is an address with a login, a query or a fragment, also if these are encoded.
// Two patterns each, for the beginning within a word and for the rest: a single one would be tried from every beginning
// to the word's end, and a stranger's long word would take an hour.
const PRIVATE = [
    [/\bdata:/i, /,/],
    [/https?:|\/\/|\.[a-z]{2,}(:\d+)?\//i, /[?#@]|%(25)*(3f|23|40)/i],
    [/@/, /@[\w.-]+\.[a-z]{2,}(:\d+)?\//i], // token@example.com/file
    [/:/, /@[\w-]+\.[a-z]/i], // user:password@example.com
];

/** @returns {Lora} of a text such as "zorp*0.8"; without a factor the strength is 1. */
export function readLora(text) {
    const star = text.lastIndexOf("*");
    const scale = star === -1 ? NaN : readNumber(text.slice(star + 1));
    if (Number.isNaN(scale)) return { path: text.trim(), scale: 1, file: null };
    return { path: text.slice(0, star).trim(), scale, file: null };
}

/** The text of a LoRA that is no file, such as "zorp*0.8", or "zorp" at strength 1: `readLora` reads it back. */
export function writeLora({ path, scale }) {
    return scale === 1 && readLora(path).path === path ? path : `${path}*${scale}`;
}

/** What is wrong with a LoRA, whose path and scale may be anything, as one sentence; null when nothing is. */
export function loraProblem({ path, scale }) {
    if (typeof path !== "string" || path.trim() === "") return "A LoRA must be named.";
    if (/^\s*data:/i.test(path)) return "A data: URI is not taken here; choose or drop the file itself.";
    if (path.length > LONGEST_REFERENCE) {
        return `A name or an address has at most ${LONGEST_REFERENCE} characters; this one has ${path.length}.`;
    }
    if (Number.isFinite(scale) && Math.abs(scale) <= LARGEST_STRENGTH) return null;
    const name = path.slice(0, LONGEST_SHOWN);
    return `The strength of ${name} must be a number from ${-LARGEST_STRENGTH} to ${LARGEST_STRENGTH}.`;
}

export const isLoraFile = ({ name }) => SUFFIXES.some((suffix) => name.toLowerCase().endsWith(suffix));

/** Whether a text must be neither shared nor remembered, as it has a login or the like in it. */
export function isPrivate(text) {
    return text.split(/\s+/).some((word) =>
        PRIVATE.some(([beginning, rest]) => {
            const at = word.search(beginning);
            return at !== -1 && rest.test(word.slice(at));
        }),
    );
}

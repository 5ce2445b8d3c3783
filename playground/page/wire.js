/** A recipe as the input of a prediction, with files as data URIs, and the way back. Pure: no page, no state. */

import { LORAS } from "./lora.js";
import { fieldNamed, isSent, isShown, own } from "./schema.js";

const [SHOWN, LONGEST_SHOWN] = [60, 120]; // characters of a data URI: of a longer one, so many

/** The names and values of inputs that are sent: those that are shown, and differ from the default or are required. */
export function sent(inputs, fields) {
    const shown = fields.filter((field) => isShown(field, inputs));
    const values = shown.map((field) => [field, own(inputs, field.name)]);
    return values.filter(([field, value]) => isSent(field, value)).map(([{ name }, value]) => [name, value]);
}

/** The input of a prediction: the inputs that are sent, files as data URIs. */
export async function encode({ inputs, loras }, fields) {
    const input = {};
    for (const [name, value] of sent(inputs, fields)) {
        input[name] = value instanceof Blob ? await toDataUri(value) : value;
    }
    if (loras.length > 0 && fieldNamed(fields, LORAS)) {
        const whole = async ({ path, scale, file }) => ({ path: file ? await toDataUri(file) : path, scale });
        input[LORAS] = JSON.stringify(await Promise.all(loras.map(whole)));
    }
    return input;
}

/** JSON with its data URIs cut, for people to read; those in texts that are JSON themselves, too. */
export function shortened(value) {
    // A pattern would need as much of the stack as there are characters, of which a LoRA has millions.
    if (typeof value === "string") return value.split('"').map(cut).join('"');
    if (Array.isArray(value)) return value.map(shortened);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, shortened(item)]));
}

function cut(text) {
    const isLong = text.startsWith("data:") && text.length > LONGEST_SHOWN;
    return isLong ? `${text.slice(0, SHOWN)}… (${text.length} characters)` : text;
}

function toDataUri(file) {
    return new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.onerror = () => reject(new Error(`${file.name ?? "A file"} cannot be read.`));
        reader.readAsDataURL(file);
    });
}

/** The bytes of a data URI, with their type; where they are not in base64, it throws a sentence. */
export function fromDataUri(text) {
    const [head, content] = text.split(",", 2);
    let characters;
    try {
        characters = atob(content);
    } catch {
        throw new Error("The server sent a picture that cannot be read.");
    }
    const bytes = Uint8Array.from(characters, (character) => character.charCodeAt(0));
    return new Blob([bytes], { type: head.slice("data:".length).split(";", 1)[0] });
}

/**
 * The metadata of a picture of ours → a recipe that draws it again.
 *
 * The predictor writes the inputs of a picture as JSON in UTF-8: as PNG text "Description", or as EXIF ImageDescription
 * of a JPEG or a WebP. Any file may be dropped on the page, so nothing here trusts a length or an offset.
 */

import { loraProblem, LORAS, MOST_LORAS } from "./lora.js";
import { accepts, fieldNamed, isGiven, readJson } from "./schema.js";

const LARGEST_FILE = 64 * 2 ** 20; // bytes
const LONGEST_TEXT = 2 ** 20; // bytes, as large as Pillow reads them
// The inputs that `script/predict --like` takes too, besides the LoRAs. A stranger may have made the picture, and must
// not have an image fetched or a check switched off.
const DRAWN_BY = [
    ...["prompt", "model", "seed", "num_inference_steps", "guidance_scale", "go_fast", "prompt_strength"],
    ...["aspect_ratio", "megapixels", "width", "height"],
];

/** @returns {Promise<Object<string, *>|null>} the inputs that a picture was drawn from; null for any other file. */
export async function readMetadata(blob) {
    try {
        if (blob.size > LARGEST_FILE) return null;
        const made = JSON.parse(await description(new DataView(await blob.arrayBuffer())));
        return typeof made === "object" && !Array.isArray(made) ? made : null;
    } catch {
        return null; // a file that ends early, text that is no UTF-8, no JSON
    }
}

/**
 * The recipe that draws a picture again, from the inputs of `readMetadata`.
 *
 * @returns {{recipe: Recipe, notes: string[]}} notes: sentences about what is to be added or was left out
 */
export function recipeOf(made, fields) {
    const said = DRAWN_BY.filter((name) => isGiven(made[name]));
    const isTaken = (name) => fields.some((field) => field.name === name && accepts(field, made[name]));
    const hasList = fieldNamed(fields, LORAS) !== undefined;
    const wrong = [...said.filter((name) => !isTaken(name)), ...(isGiven(made[LORAS]) && !hasList ? [LORAS] : [])];
    const { loras, notes } = lorasOf(hasList ? made[LORAS] : null);
    if (said.includes("prompt_strength")) {
        notes.unshift("It was drawn from an image, which is not in the picture: add that, and its mask if it had one.");
    }
    if (typeof made.cut === "string") notes.push(`The file had room for a part of its ${brief(made.cut)} alone.`);
    if (wrong.length > 0) notes.push(`What it says of ${wrong.join(", ")} cannot be used here, and is left out.`);
    const inputs = Object.fromEntries(said.filter(isTaken).map((name) => [name, made[name]]));
    return { recipe: { inputs, loras }, notes };
}

/** The LoRAs of the text in replicate_weights that can be named again, and sentences about the others. */
function lorasOf(text) {
    const entries = isGiven(text) ? entriesOf(text) : [];
    if (entries === null) return { loras: [], notes: ["What it says of its LoRAs cannot be read."] };
    const loras = [];
    const notes = [];
    for (const { path, scale = 1, clip, blocks } of entries) {
        if (loraProblem({ path, scale }) !== null) {
            notes.push("One of its LoRAs is named in a way that cannot be used here; it is left out.");
        } else if (path.startsWith("sha256:")) {
            notes.push(`One of its LoRAs came as a file, which is not in the picture: add it, at strength ${scale}.`);
        } else if (path.startsWith("COG_WEIGHTS:")) {
            notes.push(`One of its LoRAs was COG_WEIGHTS of its server, which has no name here (strength ${scale}).`);
        } else {
            if (clip !== undefined || blocks !== undefined) {
                notes.push(`${brief(path)} had other strengths in parts of the model, which the list cannot say.`);
            }
            loras.push({ path, scale, file: null });
        }
    }
    return { loras, notes };
}

/** The list of objects in a text of JSON, if the server takes as many; else null. */
function entriesOf(text) {
    const entries = readJson(text, null);
    const isList = Array.isArray(entries) && entries.length <= MOST_LORAS;
    return isList && entries.every((entry) => typeof entry === "object" && entry !== null) ? entries : null;
}

const brief = (text) => (text.length > 80 ? `${text.slice(0, 80)}…` : text);

/** The text in a file of one of three formats. Where there is none, it throws, or returns something else than JSON. */
async function description(view) {
    if (text4(view, 0) === "\x89PNG") return pngText(view);
    if (view.getUint16(0) === 0xffd8) return exifText(jpegExif(view));
    if (text4(view, 0) === "RIFF" && text4(view, 8) === "WEBP") return exifText(webpExif(view));
    throw new Error("no PNG, JPEG or WebP");
}

/** The text "Description" of a PNG: plain (tEXt) or compressed (zTXt) in Latin-1, or either in UTF-8 (iTXt). */
async function pngText(view) {
    for (let at = 8; text4(view, at + 4) !== "IEND"; at += 12 + view.getUint32(at)) {
        const type = text4(view, at + 4);
        if (!["tEXt", "zTXt", "iTXt"].includes(type)) continue;
        const chunk = bytesOf(view, at + 8, view.getUint32(at));
        const [keyword, content] = untilZero(chunk);
        if (latin1(keyword) !== "Description") continue;
        if (type === "tEXt") return latin1(bounded(content));
        if (type === "zTXt") return latin1(await inflated(content.subarray(1)));
        const [, afterLanguage] = untilZero(content.subarray(2));
        const [, text] = untilZero(afterLanguage);
        return utf8(content[0] === 1 ? await inflated(text) : bounded(text));
    }
    throw new Error("no Description");
}

/** The segment of a JPEG that has its EXIF data; behind the start of the scan are only pixels. */
function jpegExif(view) {
    for (let at = 2; view.getUint16(at) !== 0xffda; at += 2 + view.getUint16(at + 2)) {
        const isExif = view.getUint16(at) === 0xffe1 && text4(view, at + 4) === "Exif";
        if (isExif) return bytesOf(view, at + 4, view.getUint16(at + 2) - 2);
    }
    throw new Error("no EXIF");
}

function webpExif(view) {
    for (let at = 12; ; ) {
        const size = view.getUint32(at + 4, true);
        if (text4(view, at) === "EXIF") return bytesOf(view, at + 8, size);
        at += 8 + size + (size % 2); // chunks begin at even places
    }
}

/** ImageDescription of EXIF data, which may begin with "Exif\0\0" and is in either order of bytes. */
function exifText(exif) {
    const tiff = latin1(exif.subarray(0, 4)) === "Exif" ? exif.subarray(6) : exif;
    const view = new DataView(tiff.buffer, tiff.byteOffset, tiff.length);
    const little = view.getUint16(0) === 0x4949; // "II"
    const first = view.getUint32(4, little);
    const count = view.getUint16(first, little);
    for (let at = first + 2; at < first + 2 + 12 * count; at += 12) {
        if (view.getUint16(at, little) !== 0x010e) continue;
        const size = view.getUint32(at + 4, little); // of texts, in bytes
        const [text] = untilZero(bytesOf(view, size <= 4 ? at + 8 : view.getUint32(at + 8, little), size));
        return utf8(bounded(text));
    }
    throw new Error("no ImageDescription");
}

/** Bytes of a view. They must end within it: behind it, its buffer has another part of the file. */
function bytesOf(view, at, length) {
    if (at + length > view.byteLength) throw new RangeError("the file ends early");
    return new Uint8Array(view.buffer, view.byteOffset + at, length);
}

function text4(view, at) {
    // A file may have millions of empty chunks, for each of which a Uint8Array would take seconds in all.
    return String.fromCharCode(...[0, 1, 2, 3].map((offset) => view.getUint8(at + offset)));
}

/** The bytes before the first byte that is 0, and those behind it. */
function untilZero(bytes) {
    const zero = bytes.indexOf(0);
    return zero === -1 ? [bytes, bytes.subarray(bytes.length)] : [bytes.subarray(0, zero), bytes.subarray(zero + 1)];
}

function bounded(bytes) {
    if (bytes.length > LONGEST_TEXT) throw new Error("too long");
    return bytes;
}

/** Bytes that zlib packed, unpacked; it stops at the longest text, as a small file may unpack into gigabytes. */
async function inflated(bytes) {
    const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
    const parts = [];
    for (let length = 0; ; ) {
        const { done, value } = await reader.read();
        if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
        parts.push(value);
        length += value.length;
        if (length > LONGEST_TEXT) {
            reader.cancel();
            throw new Error("too long");
        }
    }
}

/** The real Latin-1, in which each byte is a character; browsers' "latin1" is Windows-1252. */
const latin1 = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

const utf8 = (bytes) => new TextDecoder("utf-8", { fatal: true }).decode(bytes);

/** The axes that a grid may have, and the values that are typed for them. Pure: no page, no state. */

import { LARGEST_STRENGTH, LORAS, loraProblem, readLora, writeLora } from "./lora.js";
import { isShown, meaningOf, problemOf, readNumber } from "./schema.js";

const MOST_VALUES = 100; // of an axis

const NUMBER = String.raw`[+-]?(?:\d+(?:\.\d*)?|\.\d+)`;
const RANGE = new RegExp(`^(${NUMBER})\\s*[-–:]\\s*(${NUMBER})(?:\\s*:\\s*(${NUMBER}))?$`); // 1-4, 0:1:0.25

/** @returns {Axis[]} of a recipe: inputs that count, the LoRA, and the strength of each that is chosen. */
export function axesOf(fields, { inputs, loras }) {
    const scales = loras.map((_, index) => scaleAxis(loras, index));
    return fields
        .filter((field) => isAxis(field) && isShown(field, inputs))
        .flatMap((field) => (field.name === LORAS ? [loraAxis(scales), ...scales] : inputAxis(field)));
}

/** Whether two axes can be the sides of one grid: neither replaces what the other changes, or decides if it counts. */
export function areApart(one, other) {
    const touches = (axis, ids) => axis.changes.some((id) => ids.includes(id));
    return !touches(one, [...other.changes, ...other.restsOn]) && !touches(other, one.restsOn);
}

/** @returns {Recipe[][]} of the cells, a row for each value of y: the recipe with the values of both sides. */
export function cellRecipes(recipe, x, y) {
    return y.values.map((row) => x.values.map((column) => y.axis.put(x.axis.put(recipe, column), row)));
}

/**
 * The values of an axis as they are typed: separated by commas, numbers in ranges such as 1-4 and 0:1:0.25 too, and
 * words one per line.
 *
 * @returns {{values: Array, problem: string|null}} the problem is the sentence on the first value that is wrong
 */
export function readValues(text, { field, problem }) {
    const parts = isWords(field) ? text.split("\n") : text.split(",").map((part) => part.trim());
    const items = parts.filter((part) => part.trim() !== "");
    if (items.length === 0) return { values: [], problem: "At least one value is needed." };
    const values = [];
    for (const item of items) {
        const more = itemValues(item, field);
        if (values.length + more.length > MOST_VALUES) {
            return { values: [], problem: `With ${item} there would be more than ${MOST_VALUES} values.` };
        }
        const wrong = more.map(problem).find((sentence) => sentence !== null);
        if (wrong) return { values: [], problem: `“${item}” cannot be: ${wrong}` };
        values.push(...more);
    }
    return { values, problem: null };
}

/** Whether values are any words, which may have commas in them. */
export const isWords = ({ type, enum: choices }) => type === "string" && !choices;

function isAxis({ name, type, format, secret }) {
    const isPlain = ["string", "boolean", "number", "integer"].includes(type) && format !== "uri";
    return isPlain && !secret && name !== "num_outputs";
}

/** The axis of an input; the other axes below have the same properties. */
function inputAxis(field) {
    const { name, label, rules } = field;
    return {
        id: name, // also a part of a file's name
        label,
        field, // its type and choices say how values are typed
        changes: [name], // the ids of all that it changes
        restsOn: rules.map(({ of }) => of), // the inputs that decide whether it counts
        problem: (value) => problemOf({ ...field, required: true }, value), // the sentence on a wrong value, or null
        put: ({ inputs, loras }, value) => ({ inputs: { ...inputs, [name]: value }, loras }), // a value into a recipe
        show: String, // a value as people read it
    };
}

/** The only LoRA, in place of those that are chosen and of their strengths. */
function loraAxis(scales) {
    return {
        id: LORAS,
        label: "LoRA",
        field: { type: "string", enum: null },
        changes: [LORAS, ...scales.map(({ id }) => id)],
        restsOn: [],
        problem: (text) => loraProblem(readLora(text)),
        put: ({ inputs }, text) => ({ inputs, loras: [readLora(text)] }),
        show: (text) => {
            const lora = readLora(text);
            return writeLora({ ...lora, path: shownPath(lora.path) });
        },
    };
}

function scaleAxis(loras, index) {
    const names = loras.map(({ path, file }) => (file ? path : shownPath(path)));
    const name = names[index];
    const isTwice = names.filter((other) => other === name).length > 1;
    const id = `scale_${index + 1}_${name}`;
    const withScale = (scale) => (lora, place) => (place === index ? { ...lora, scale } : lora);
    return {
        id,
        label: `Scale of ${name}${isTwice ? ` (LoRA ${index + 1})` : ""}`,
        field: { type: "number", enum: null },
        changes: [id],
        restsOn: [],
        problem: (scale) =>
            Math.abs(scale) <= LARGEST_STRENGTH
                ? null
                : `Scale of ${name} must be a number from ${-LARGEST_STRENGTH} to ${LARGEST_STRENGTH}.`,
        put: (recipe, scale) => ({ inputs: recipe.inputs, loras: recipe.loras.map(withScale(scale)) }),
        show: String,
    };
}

/** A reference as it may be shown: an address without its login and its query. */
const shownPath = (path) => path.replace(/[?#].*/, "").replace(/^https?:\/\/([^/]*@)?/i, "");

/** The values that one item means; where it means none, NaN or itself. */
function itemValues(item, field) {
    if (field.enum) return [field.enum.find((choice) => String(choice) === item) ?? item];
    if (field.type === "boolean") return [meaningOf(field, item.toLowerCase())];
    if (isWords(field)) return [item];
    const [, first, last, step = "1"] = RANGE.exec(item) ?? [];
    return first === undefined ? [readNumber(item)] : rangeValues(first, Number(last), step);
}

/** The numbers from the first to the last, in the decimals that were typed; of too many, the caller needs one more. */
function rangeValues(first, last, step) {
    const start = Number(first);
    const width = Math.abs(Number(step));
    const count = Math.floor(Math.abs(last - start) / width + 1e-9) + 1;
    if (!Number.isFinite(count)) return [NaN];
    const decimals = Math.max(...[first, step].map((text) => text.split(".")[1]?.length ?? 0));
    return Array.from({ length: Math.min(count, MOST_VALUES + 1) }, (_, index) => {
        return Number((start + Math.sign(last - start) * index * width).toFixed(decimals));
    });
}

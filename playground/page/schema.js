/**
 * The document of a Cog server → what its form is made of. Pure: no page, no state.
 *
 * Every input of the document becomes a field, whatever the project. What its document cannot say (which input counts
 * beside which) is added where the document is recognised as this project's.
 */

/**
 * @typedef {object} Field one input
 * @property {string} name as it is sent
 * @property {string} title as the document has it
 * @property {string} label as people read it
 * @property {string} description in the document's words, which may have `code` in them
 * @property {"string"|"integer"|"number"|"boolean"|"array"|"object"} type
 * @property {string|null} format "uri" for a file or its address
 * @property {Array|null} enum the choices
 * @property {*} default null when there is none
 * @property {number|null} minimum
 * @property {number|null} maximum
 * @property {number} step from one value of a slider to the next
 * @property {boolean} required whether it must be given where it is shown
 * @property {number} order
 * @property {Rule[]} rules all of which hold where it is shown
 * @property {Idle|null} idle
 */
/** @typedef {{of: string, fallback: *, holds: function(*): boolean}} Rule on the value, or default, of another input */
/** @typedef {{of: string, value: string, sentence: string}} Idle when, by another input, this one changes nothing */
/** @typedef {{name: string, title: string, fields: Field[]}} Group */

const GROUPS = [
    { name: "prompt", title: "Prompt", inputs: ["prompt"] },
    { name: "image", title: "Image and mask", inputs: ["image", "mask", "prompt_strength"] },
    { name: "loras", title: "LoRAs", inputs: ["replicate_weights", "lora_scale", "extra_lora", "extra_lora_scale"] },
    { name: "size", title: "Size", inputs: ["aspect_ratio", "megapixels", "width", "height"] },
    {
        name: "sampling",
        title: "Sampling",
        inputs: ["model", "num_outputs", "num_inference_steps", "guidance_scale", "seed", "go_fast"],
    },
    { name: "output", title: "Output", inputs: ["output_format", "output_quality", "disable_safety_checker"] },
];

const CUSTOM = "custom";
const withImage = ["image", isGiven];
const withoutImage = ["image", (value) => !isGiven(value)];
const customSize = ["aspect_ratio", (value) => value === CUSTOM];
const namedSize = ["aspect_ratio", (value) => value !== CUSTOM];
// Of this project's contract: an input is shown while all these hold of others.
const RULES = {
    mask: [withImage],
    prompt_strength: [withImage],
    aspect_ratio: [withoutImage],
    megapixels: [withoutImage, namedSize],
    width: [withoutImage, customSize],
    height: [withoutImage, customSize],
};
const REQUIRED_WHERE_SHOWN = ["width", "height"];
const IDLE = {
    guidance_scale: { of: "model", value: "schnell", sentence: "It changes nothing now: schnell has no guidance." },
    output_quality: { of: "output_format", value: "png", sentence: "It changes nothing now: png loses nothing." },
};

// A slider over more values than this would leap over most of them.
const MOST_SLIDER_STEPS = 10_000;

/**
 * The fields of a form, in the document's order and in groups.
 *
 * @param {object} document OpenAPI, as a Cog server gives it
 * @returns {{fields: Field[], groups: Group[]}}
 */
export function readSchema(document) {
    const { schemas } = document.components;
    const { properties = {}, required = [] } = schemas.Input;
    const fields = Object.entries(properties).map(([name, property]) =>
        readField(name, resolve(property, schemas), required.includes(name)),
    );
    const byName = Object.fromEntries(fields.map((field) => [field.name, field]));
    const ours = "image" in byName && byName.aspect_ratio?.enum?.includes(CUSTOM);
    if (ours) fields.forEach((field) => addRules(field, byName));
    fields.sort((one, other) => one.order - other.order);
    return { fields, groups: grouped(fields) };
}

/**
 * Whether an input counts beside what the others say; what does not is neither shown nor sent.
 *
 * @param {Field} field
 * @param {Object<string, *>} inputs of a recipe
 */
export function isShown(field, inputs) {
    return field.rules.every(({ of, fallback, holds }) => holds(inputs[of] ?? fallback));
}

/** The sentence on an input that is sent and changes nothing beside what the others say; null for one that does. */
export function idleSentence(field, inputs) {
    return field.idle && inputs[field.idle.of] === field.idle.value ? field.idle.sentence : null;
}

/** Whether a value is another one than the default, so that it must be sent. An empty text stands for none. */
export function differs(field, value) {
    const plain = (it) => JSON.stringify(isGiven(it) ? it : null);
    return value !== undefined && value !== null && plain(value) !== plain(field.default);
}

/** Whether there is a value at all. */
export function isGiven(value) {
    return value !== undefined && value !== null && value !== "";
}

/** Whether a field is a number with both bounds, few enough values apart for a slider. */
export function isBounded({ type, minimum, maximum, step }) {
    const number = type === "integer" || type === "number";
    return number && minimum !== null && maximum !== null && (maximum - minimum) / step <= MOST_SLIDER_STEPS;
}

/**
 * What is wrong with a value, as one sentence; null when nothing is.
 *
 * @param {Field} field one that is shown
 * @param {*} value undefined for none; NaN for what was typed and is no number
 */
export function problemOf(field, value) {
    if (!isGiven(value)) return field.required ? `${field.label} must be given.` : null;
    if (field.enum) {
        return field.enum.includes(value) ? null : `${field.label} must be one of ${field.enum.join(", ")}.`;
    }
    if (field.type === "integer" || field.type === "number") {
        return isNumberOf(field, value) ? null : `${field.label} must be ${numbersOf(field, value)}.`;
    }
    if (field.format === "uri" && typeof value === "string") {
        const address = /^(https?:\/\/[^\s/]|data:)/i.test(value.trim());
        return address ? null : `${field.label} must be a file, or an address that begins with https:// or http://.`;
    }
    return null;
}

function isNumberOf({ type, minimum, maximum }, value) {
    const kind = type === "integer" ? Number.isSafeInteger(value) : Number.isFinite(value);
    return kind && value >= (minimum ?? value) && value <= (maximum ?? value);
}

function numbersOf({ type, minimum, maximum }, value) {
    const kind = type === "integer" ? "a whole number" : "a number";
    // A browser counts no further than this without leaving numbers out, which is told to whoever went there.
    const uncountable = Number.isInteger(value) && !Number.isSafeInteger(value);
    const least = minimum ?? (uncountable ? Number.MIN_SAFE_INTEGER : null);
    const most = maximum ?? (uncountable ? Number.MAX_SAFE_INTEGER : null);
    if (least !== null && most !== null) return `${kind} from ${least} to ${most}`;
    if (least !== null) return `${kind} of at least ${least}`;
    return most !== null ? `${kind} of at most ${most}` : kind;
}

/** A property with what it refers to; the document keeps choices in schemas of their own. */
function resolve(property, schemas) {
    const parts = [...(property.allOf ?? []), ...(property.anyOf ?? [])].filter(({ type }) => type !== "null");
    if (property.$ref) parts.push(schemas[property.$ref.split("/").at(-1)]);
    return Object.assign({}, ...parts.map((part) => resolve(part, schemas)), property);
}

function readField(name, property, required) {
    const field = {
        name,
        title: String(property.title ?? name),
        label: labelOf(name),
        description: String(property.description ?? ""),
        type: [property.type].flat().find((type) => type !== "null") ?? "string", // or null, says a newer OpenAPI
        format: property.format ?? null,
        enum: property.enum ?? null,
        default: property.default ?? null,
        minimum: property.minimum ?? null,
        maximum: property.maximum ?? null,
        required,
        order: property["x-order"] ?? 0,
        rules: [],
        idle: null,
    };
    return { ...field, step: stepOf(field) };
}

/** "num_inference_steps" → "Inference steps". */
function labelOf(name) {
    const words = name
        .replaceAll("_", " ")
        .replace(/^num /, "")
        .replace(/\blora(s?)\b/gi, "LoRA$1");
    return words.charAt(0).toUpperCase() + words.slice(1);
}

/** Whole numbers go by one, or by the multiple that they are rounded to; others by what a finger can aim at. */
function stepOf({ type, minimum, maximum, description }) {
    if (type === "integer") return Number(/multiple of (\d+)/.exec(description)?.[1] ?? 1);
    const range = maximum - minimum;
    if (range <= 1) return 0.01;
    return range <= 5 ? 0.05 : 0.1;
}

function addRules(field, byName) {
    const rules = RULES[field.name] ?? [];
    field.rules = rules.map(([of, holds]) => ({ of, fallback: byName[of].default, holds }));
    field.idle = IDLE[field.name] ?? null;
    field.required ||= REQUIRED_WHERE_SHOWN.includes(field.name);
}

function grouped(fields) {
    const named = GROUPS.map(({ name, title, inputs }) => {
        const found = inputs.map((input) => fields.find((field) => field.name === input));
        return { name, title, fields: found.filter((field) => field !== undefined) };
    });
    const placed = new Set(GROUPS.flatMap(({ inputs }) => inputs));
    const other = fields.filter((field) => !placed.has(field.name));
    const groups = [...named, { name: "other", title: "Other", fields: other }];
    return groups.filter((group) => group.fields.length > 0);
}

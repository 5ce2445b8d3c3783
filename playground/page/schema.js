/**
 * The OpenAPI document of a Cog server → the fields of its form, and the rules for their values. Pure: no page, no
 * state.
 *
 * Every input of the document becomes a field, whatever the project. Rules between inputs, which the document cannot
 * say, are added where it is recognised as this project's.
 */

// The name, the title and the inputs of each.
const GROUPS = [
    ["prompt", "Prompt", ["prompt"]],
    ["image", "Image and mask", ["image", "mask", "prompt_strength"]],
    ["loras", "LoRAs", ["replicate_weights", "lora_scale", "extra_lora", "extra_lora_scale"]],
    ["size", "Size", ["aspect_ratio", "megapixels", "width", "height"]],
    ["sampling", "Sampling", ["model", "num_outputs", "num_inference_steps", "guidance_scale", "seed", "go_fast"]],
    ["output", "Output", ["output_format", "output_quality", "disable_safety_checker"]],
];

const CUSTOM = "custom";
const withImage = ["image", (value) => isGiven(value)];
const withoutImage = ["image", (value) => !isGiven(value)];
const customSize = ["aspect_ratio", (value) => value === CUSTOM];
const namedSize = ["aspect_ratio", (value) => value !== CUSTOM];
// Of this project's contract: an input is shown while all these rules on other inputs hold.
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
    guidance_scale: ["model", (value) => value === "schnell", "It changes nothing now: schnell has no guidance."],
    output_quality: ["output_format", (value) => value === "png", "It changes nothing now: png loses nothing."],
};

const MOST_SLIDER_STEPS = 10_000; // a slider over more values would skip most of them
const EASY_STEPS = 50; // at least so many values of a slider, by steps of 1, 0.1, 0.01 …

const NUMBER = /^[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i;
const ADDRESS = /^(https?:\/\/[^\s/]|data:)/i;

/** The fields of a document, sorted and in groups `{name, title, fields}`; and `ours`: it is this project's. */
export function readSchema(document) {
    const { schemas } = document.components;
    const { properties = {}, required = [] } = schemas.Input;
    const fields = Object.entries(properties).map(([name, property]) =>
        readField(name, property, resolve(property, schemas), required.includes(name)),
    );
    const byName = new Map(fields.map((field) => [field.name, field]));
    const ours = byName.has("image") && byName.get("aspect_ratio")?.enum?.includes(CUSTOM) === true;
    if (ours) fields.forEach((field) => addRules(field, byName));
    fields.sort((one, other) => one.order - other.order);
    return { fields, groups: grouped(fields), ours };
}

/** Whether an input counts beside the values of others; one that does not is neither shown nor sent. */
export const isShown = (field, inputs) => field.rules.every((rule) => ruleHolds(rule, inputs));

/** The sentence on an input that is sent and changes nothing beside the values of others; null for one that does. */
export function idleSentence(field, inputs) {
    return field.idle && ruleHolds(field.idle, inputs) ? field.idle.sentence : null;
}

const ruleHolds = ({ of, fallback, holds }, inputs) => holds(inputs[of] ?? fallback);

/** @returns {Field|undefined} the one of an input. */
export const fieldNamed = (fields, name) => fields.find((field) => field.name === name);

/** The value of an object's own property: every object inherits some, such as "constructor". */
export const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);

/** Whether a value differs from the default. An empty text stands for none. */
export function differs(field, value) {
    if (value === undefined || value === null) return false;
    const plain = (it) => (isGiven(it) ? it : null);
    return !isSame(plain(value), plain(field.default));
}

/** Whether a value must be sent: one of a required field always, others where they differ from the default. */
export const isSent = (field, value) => (field.required ? isGiven(value) : differs(field, value));

/** Whether two values are the same in JSON. A file is the same only as itself; NaN is the same as NaN. */
export function isSame(one, other) {
    const isJson = (it) => typeof it === "object" && !(it instanceof Blob);
    return Object.is(one, other) || (isJson(one) && isJson(other) && JSON.stringify(one) === JSON.stringify(other));
}

export const isGiven = (value) => value !== undefined && value !== null && value !== "";

/** Whether the value of an input must be neither seen nor kept. */
export const isSecret = (name, fields) => fieldNamed(fields, name)?.secret === true;

/** The inputs without those whose values must not be kept. */
export function withoutSecrets(inputs, fields) {
    return Object.fromEntries(Object.entries(inputs).filter(([name]) => !isSecret(name, fields)));
}

/** Whether a field is a number with both bounds, few enough values apart for a slider. */
export function isBounded({ type, minimum, maximum, step }) {
    return isNumeric(type) && minimum !== null && maximum !== null && (maximum - minimum) / step <= MOST_SLIDER_STEPS;
}

export const isNumeric = (type) => type === "integer" || type === "number";

/** The number that a text writes in decimals; NaN where it writes none. */
export const readNumber = (text) => (NUMBER.test(text.trim()) ? Number(text) : NaN);

/**
 * The value that a text means to a field: undefined for an empty one; where it means nothing, NaN for a field of
 * numbers, and for others the text itself.
 */
export function meaningOf({ type, format }, text) {
    const bare = text.trim();
    if (type === "string" && format !== "uri") return text;
    if (bare === "") return undefined;
    if (isNumeric(type)) return readNumber(text);
    if (type === "boolean") return ["true", "false"].includes(bare) ? bare === "true" : text;
    return format === "uri" ? bare : readJson(text, text);
}

/** The text that means a value; lists and objects are written in JSON. */
export const jsonText = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

/** The value of a text in JSON; `otherwise` where it is none. */
export function readJson(text, otherwise) {
    try {
        return JSON.parse(text);
    } catch {
        return otherwise;
    }
}

/** What is wrong with a value of a field that is shown, as one sentence; null when nothing is. */
export function problemOf(field, value) {
    if (!isGiven(value)) return field.required ? `${field.label} must be given.` : null;
    const [isRight, wanted] = checked(field, value);
    return isRight ? null : `${field.label} must be ${wanted}.`;
}

/** @returns {Object<string, string>} by the name of each wrong input of a recipe, the sentence on it. */
export function problemsOf(inputs, fields) {
    const shown = fields.filter((field) => isShown(field, inputs));
    const problems = shown.map((field) => [field.name, problemOf(field, own(inputs, field.name))]);
    return Object.fromEntries(problems.filter(([, problem]) => problem !== null));
}

/** Whether a field takes a value from elsewhere, such as a shared address: never a file or its address. */
export const accepts = (field, value) => field.format !== "uri" && isGiven(value) && problemOf(field, value) === null;

/** Whether a field takes a value, and a description of the values that it takes. */
function checked(field, value) {
    const { type, format, enum: choices } = field;
    if (choices) return [choices.includes(value), `one of ${choices.join(", ")}`];
    if (isNumeric(type)) return [isNumberOf(field, value), numbersOf(field, value)];
    if (type === "boolean") return [typeof value === "boolean", "true or false"];
    if (type === "array") return [Array.isArray(value), 'a list in JSON, such as ["one", "two"]'];
    const isObject = typeof value === "object" && !Array.isArray(value);
    if (type === "object") return [isObject, 'an object in JSON, such as {"name": "value"}'];
    if (format !== "uri") return [typeof value === "string", "a text"];
    const isFile = value instanceof Blob || (typeof value === "string" && ADDRESS.test(value.trim()));
    return [isFile, "a file, or an address that begins with https:// or http://"];
}

function isNumberOf({ type, minimum, maximum }, value) {
    const kind = type === "integer" ? Number.isSafeInteger(value) : Number.isFinite(value);
    return kind && value >= (minimum ?? value) && value <= (maximum ?? value);
}

function numbersOf({ type, minimum, maximum }, value) {
    const kind = type === "integer" ? "a whole number" : "a number";
    // Beyond these, JavaScript has no exact integers; the bounds are told only for such a number.
    const uncountable = Number.isInteger(value) && !Number.isSafeInteger(value);
    const least = minimum ?? (uncountable ? Number.MIN_SAFE_INTEGER : null);
    const most = maximum ?? (uncountable ? Number.MAX_SAFE_INTEGER : null);
    if (least !== null && most !== null) return `${kind} from ${least} to ${most}`;
    if (least !== null) return `${kind} of at least ${least}`;
    return most !== null ? `${kind} of at most ${most}` : kind;
}

/** A property with all that it refers to: the document keeps choices in schemas of their own. */
function resolve(property, schemas) {
    const parts = [...(property.allOf ?? []), ...(property.anyOf ?? [])].filter(({ type }) => type !== "null");
    if (property.$ref) parts.push(schemas[property.$ref.split("/").at(-1)]);
    return Object.assign({}, ...parts.map((part) => resolve(part, schemas)), property);
}

/** @returns {Field} of a property with all that it refers to; only its own description is about this input. */
function readField(name, { description }, property, required) {
    const field = {
        name, // as it is sent
        label: labelOf(name), // as people read it
        description: String(description ?? ""), // may have `code` in it
        type: [property.type].flat().find((type) => type !== "null") ?? "string", // or null, says a newer OpenAPI
        format: property.format ?? null, // "uri" for a file or its address
        secret: property["x-cog-secret"] === true || property.format === "password", // neither shown nor kept
        enum: property.enum ?? null, // the choices
        default: property.default ?? null,
        minimum: property.minimum ?? null,
        maximum: property.maximum ?? null,
        required, // where it is shown
        order: property["x-order"] ?? 0,
        rules: [], // {of, fallback, holds}: on the value, or default, of another input; all hold where it is shown
        idle: null, // such a rule with a sentence: where it holds, the field changes nothing
    };
    return { ...field, step: stepOf(field) };
}

/** "num_inference_steps" → "Inference steps". */
function labelOf(name) {
    const spaced = name.replaceAll("_", " ").replace(/^num /, "");
    const words = spaced.replace(/\blora(s?)\b/gi, "LoRA$1");
    return words.charAt(0).toUpperCase() + words.slice(1);
}

/** Between two values of a slider: of whole numbers 1, or the multiple that they are rounded to; else a power of 10. */
function stepOf({ type, minimum, maximum, description }) {
    if (type === "integer") return Number(/multiple of (\d+)/.exec(description)?.[1] ?? 1);
    if (minimum === null || maximum === null) return 0.1;
    return 10 ** Math.floor(Math.log10((maximum - minimum) / EASY_STEPS));
}

function addRules(field, byName) {
    const ruleOf = ([of, holds]) => ({ of, fallback: byName.get(of)?.default, holds });
    const idle = own(IDLE, field.name);
    field.rules = (own(RULES, field.name) ?? []).map(ruleOf);
    field.idle = idle === undefined ? null : { ...ruleOf(idle), sentence: idle[2] };
    field.required ||= REQUIRED_WHERE_SHOWN.includes(field.name);
}

function grouped(fields) {
    const groups = GROUPS.map(([name, title, inputs]) => {
        const found = inputs.map((input) => fieldNamed(fields, input)).filter((field) => field !== undefined);
        return { name, title, fields: found };
    });
    const placed = groups.flatMap((group) => group.fields);
    groups.push({ name: "other", title: "Other", fields: fields.filter((field) => !placed.includes(field)) });
    return groups.filter((group) => group.fields.length > 0);
}

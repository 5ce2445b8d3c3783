/**
 * A recipe in the page's address, `#prompt=a+red+fox&seed=7&lora=zorp*0.8`, and what is taken from a stranger at all.
 *
 * Who opens a shared address, or drops somebody's picture, sees the values in the form before anything is drawn. What
 * could do harm all the same is neither written nor read: a switched-off check, addresses of images, which a server
 * would fetch, and secrets in addresses.
 */

/** The most LoRAs that the list takes, by the server's rule. */
export const MOST_LORAS = 8;

const LORA = "lora";
const UNSHARED = new Set(["image", "mask", "disable_safety_checker", "replicate_weights"]);
const LARGEST_STRENGTH = 10;
const LONGEST_REFERENCE = 8192; // characters
const DECIMAL = /^-?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i;
// What nobody should pass on: a data URI, and an address with a login, a query or a fragment, encoded ones included.
// Each is how it begins within a word, and what stands behind that: one pattern for both would be looked for from every
// beginning to the end of the word, which a stranger can make as long as an hour.
const PRIVATE = [
    [/\bdata:/i, /,/],
    [/https?:|\/\/|\.[a-z]{2,}(:\d+)?\//i, /[?#@]|%(25)*(3f|23|40)/i],
    [/@/, /@[\w.-]+\.[a-z]{2,}(:\d+)?\//i], // token@example.com/file
    [/:/, /@[\w-]+\.[a-z]/i], // user:password@example.com
];

/**
 * The address of a recipe, as far as it can be shared.
 *
 * @param {Recipe} recipe
 * @returns {string} "#" and pairs of name and value
 */
export function toFragment({ inputs, loras }) {
    const pairs = new URLSearchParams(Object.entries(inputs).filter(isSharedInput));
    for (const lora of loras.filter(isSharedLora)) pairs.append(LORA, `${lora.path}*${lora.scale}`);
    return `#${pairs}`;
}

/**
 * What `toFragment` leaves out.
 *
 * @param {Recipe} recipe
 * @returns {string[]} names of inputs and of files; a LoRA by an address that is private is "a LoRA"
 */
export function unshared({ inputs, loras }) {
    const isGiven = ([, value]) => value !== undefined && value !== null;
    const names = Object.entries(inputs).filter((pair) => isGiven(pair) && !isSharedInput(pair));
    const others = loras.filter((lora) => !isSharedLora(lora));
    return [...names.map(([name]) => name), ...others.map(({ path, file }) => (file ? path : "a LoRA"))];
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
    const inputs = {};
    for (const [name, text] of pairs) {
        const field = fields.find((candidate) => candidate.name === name);
        const value = field && typed(text, field.type);
        if (field && isSharedInput([name, value]) && accepts(field, value)) inputs[name] = value;
    }
    const texts = pairs.filter(([name]) => name === LORA).map(([, text]) => text);
    const loras = texts.map(readLora).filter((lora) => acceptsLora(lora) && isSharedLora(lora));
    return Object.keys(inputs).length + loras.length > 0 ? { inputs, loras: loras.slice(0, MOST_LORAS) } : null;
}

/**
 * Whether an input takes a value: its type, one of its choices, within its bounds. Files are never taken.
 *
 * @param {Field} field
 * @param {*} value of JSON
 */
export function accepts({ type, format, enum: choices, minimum, maximum }, value) {
    if (format === "uri" || (choices && !choices.includes(value))) return false;
    if (type === "string" || type === "boolean") return typeof value === type;
    // Larger whole numbers than the safe ones would come out as others.
    const isNumber = type === "integer" ? Number.isSafeInteger(value) : Number.isFinite(value);
    return isNumber && value >= (minimum ?? -Infinity) && value <= (maximum ?? Infinity);
}

/** Whether the list of LoRAs takes one: a reference, which is no data URI, and a strength. */
export function acceptsLora({ path, scale }) {
    const isReference = typeof path === "string" && path.trim() !== "" && path.length <= LONGEST_REFERENCE;
    return isReference && !/^\s*data:/i.test(path) && Number.isFinite(scale) && Math.abs(scale) <= LARGEST_STRENGTH;
}

function isSharedInput([name, value]) {
    const isPlain = ["string", "number", "boolean"].includes(typeof value);
    return isPlain && !UNSHARED.has(name) && !isPrivate(String(value));
}

function isSharedLora({ path, file }) {
    return !file && !isPrivate(path);
}

function isPrivate(text) {
    return text.split(/\s+/).some((word) =>
        PRIVATE.some(([beginning, rest]) => {
            const at = word.search(beginning);
            return at !== -1 && rest.test(word.slice(at));
        }),
    );
}

/** The value that a text means; undefined where it means none of its type. */
function typed(text, type) {
    if (type === "string") return text;
    if (type === "boolean") return { true: true, false: false }[text];
    return DECIMAL.test(text) ? Number(text) : undefined;
}

/** `path*scale`; without a factor the strength is 1. */
function readLora(text) {
    const star = text.lastIndexOf("*");
    const factor = text.slice(star + 1);
    if (star === -1 || !DECIMAL.test(factor)) return { path: text, scale: 1, file: null };
    return { path: text.slice(0, star), scale: Number(factor), file: null };
}

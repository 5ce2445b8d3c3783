/** The controls of fields, by type. */

import { labelledButton, radioView, slider } from "./browser.js";
import { describedBy, edit, headView, icon, isWrong, keepSeed, leave, typedText, valueOf } from "./field.js";
import { isBounded, isGiven, isNumeric, jsonText, meaningOf } from "./schema.js";
import { selectedPicture, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

const MOST_SEGMENTS = 5;
const MOST_SEGMENT_CHARACTERS = 24; // of all of them: they stand in one row
const COLUMNS = 44; // characters in a line of a text field, about
const RATIO = /^\d+:\d+$/;

/** The control of a field that is no file, with its head. */
export function controlView(field) {
    const { name, type, secret } = field;
    if (choices(field)) return choiceView(field);
    if (type === "boolean") return headView(field, { end: switchView(field) });
    if (isNumeric(type)) return name === "seed" ? seedView(field) : rangeView(field);
    return secret ? secretView(field) : textView(field);
}

/** The choices of a field. A required boolean has two: a switch could not show that none was made yet. */
function choices({ enum: values, type, required }) {
    return values ?? (type === "boolean" && required ? [true, false] : null);
}

// Texts

function textView(field) {
    const { name, default: usual } = field;
    const text = jsonText(valueOf(field) ?? usual ?? "");
    const least = name === "prompt" ? 3 : 1;
    return html`
        ${headView(field)}
        <textarea
            id="field-${name}"
            class="form-text"
            rows=${Math.max(least, rowsOf(text))}
            placeholder=${typeof usual === "object" && usual !== null ? jsonText(usual) : nothing}
            ?required=${field.required}
            aria-invalid=${isWrong(name)}
            aria-describedby=${describedBy(name)}
            .value=${typedText(field, text)}
            @input=${({ target }) => edit(field, meaningOf(field, target.value))}
            @blur=${() => leave(field)}
        ></textarea>
    `;
}

/** Lines that a text takes, for browsers that do not grow a field by its content. */
function rowsOf(text) {
    return text.split("\n").reduce((rows, line) => rows + Math.max(1, Math.ceil(line.length / COLUMNS)), 0);
}

function secretView(field) {
    const { name } = field;
    return html`
        ${headView(field)}
        <input
            id="field-${name}"
            type="password"
            autocomplete="off"
            ?required=${field.required}
            aria-invalid=${isWrong(name)}
            aria-describedby=${describedBy(name)}
            .value=${typedText(field, valueOf(field) ?? "")}
            @input=${({ target }) => edit(field, target.value)}
            @blur=${() => leave(field)}
        />
    `;
}

// Numbers

/** A number, with a slider where one can be aimed with. */
function rangeView(field) {
    const { name, minimum, default: usual } = field;
    const value = valueOf(field);
    const shown = Number.isFinite(value) ? value : (usual ?? minimum);
    const set = (number) => edit(field, number);
    const range = slider(field, { kind: "form-range", labelledBy: `label-${name}`, value: shown, set });
    return html`${headView(field, { end: numberView(field) })} ${isBounded(field) ? range : nothing}`;
}

function numberView(field) {
    const { name, default: usual } = field;
    return numberInput(field, {
        id: `field-${name}`,
        placeholder: String(usual ?? (name === "seed" ? "random" : "none")),
        required: field.required,
        isWrong: isWrong(name),
        describedBy: describedBy(name),
        value: valueOf(field),
        text: typedText(field, String(valueOf(field) ?? "")),
        set: (value) => edit(field, value),
        leave: () => leave(field),
    });
}

/**
 * A field that a number is typed into. Its type is "text", as one of type "number" hides text that is no number; the
 * arrow keys are handled here.
 *
 * @param {{type: string, minimum: number|null, maximum: number|null, step: number, default: *}} field
 * @param {object} control `value`: a number or undefined; `text`: its text, of the directive `typed`; `set` gets
 *     undefined for an empty text, NaN for one that is no number
 */
export function numberInput(field, control) {
    const { id, placeholder = nothing, label = nothing, required = false, value, text, set } = control;
    const onKey = (event) => {
        const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
        if (direction === undefined) return;
        event.preventDefault();
        set(stepped(field, value, direction));
    };
    return html`
        <input
            id=${id}
            class="form-number"
            type="text"
            role="spinbutton"
            inputmode=${keyboardOf(field)}
            placeholder=${placeholder}
            aria-label=${label}
            aria-valuenow=${Number.isFinite(value) ? value : nothing}
            aria-valuemin=${field.minimum ?? nothing}
            aria-valuemax=${field.maximum ?? nothing}
            ?required=${required}
            aria-invalid=${control.isWrong}
            aria-describedby=${control.describedBy}
            .value=${text}
            @input=${({ target }) => set(meaningOf(field, target.value))}
            @keydown=${onKey}
            @blur=${control.leave}
        />
    `;
}

/** The keyboard of a phone; both of these have no minus. */
function keyboardOf({ type, minimum }) {
    if (minimum === null || minimum < 0) return nothing;
    return type === "integer" ? "numeric" : "decimal";
}

/** The number one step up (1) or down (-1), within the bounds, without the trailing digits of binary fractions. */
function stepped({ minimum, maximum, step, default: usual }, value, direction) {
    const from = Number.isFinite(value) ? value : (usual ?? minimum ?? 0);
    const sum = from + direction * step;
    const next = Number.isInteger(sum) ? sum : Number(sum.toPrecision(12));
    return Math.min(maximum ?? next, Math.max(minimum ?? next, next));
}

function seedView(field) {
    const { seedLocked } = state;
    const lock = () => keepSeed(seedLocked ? null : (selectedPicture() ?? { seed: null }));
    return html`
        ${headView(field)}
        <div class="form-seed">
            ${numberView(field)}
            ${labelledButton(icon(seedLocked ? "locked" : "unlocked"), "Lock the seed", lock, {
                title: seedLocked ? "The seed stays; press to let it change" : "Keep the seed of the picture",
                pressed: seedLocked,
            })}
            ${labelledButton(icon("random"), "Random seed", () => edit(field, undefined), {
                title: seedLocked ? "Another seed, which then stays" : "A new seed each time",
            })}
        </div>
    `;
}

// Choices

function switchView(field) {
    const { name } = field;
    return html`
        <input
            id="field-${name}"
            class="form-switch"
            type="checkbox"
            aria-invalid=${isWrong(name)}
            aria-describedby=${describedBy(name)}
            .checked=${(valueOf(field) ?? field.default) === true}
            @change=${({ target }) => edit(field, target.checked)}
        />
    `;
}

function choiceView(field) {
    const values = choices(field);
    const texts = values.map(choiceText);
    if (texts.filter((text) => RATIO.test(text)).length > 2) {
        return html`${headView(field, { isLabel: false })}${radiosView(field, values, "form-frames")}`;
    }
    const isShort = values.length <= MOST_SEGMENTS && texts.join("").length <= MOST_SEGMENT_CHARACTERS;
    if (!isShort) return selectView(field, values);
    return headView(field, { end: radiosView(field, values, "form-segments"), isLabel: false });
}

const choiceText = (value) => (typeof value === "boolean" ? (value ? "Yes" : "No") : String(value));

/** Radio buttons: "form-segments" in a row, "form-frames" with the shapes that their values name. */
function radiosView(field, values, kind) {
    const { name } = field;
    const chosen = valueOf(field) ?? field.default;
    const hasFrames = kind === "form-frames";
    const radioOf = (value) => {
        const label = hasFrames ? [frameIcon(value), html`<span>${value}</span>`] : choiceText(value);
        return radioView(`field-${name}`, label, chosen === value, () => edit(field, value));
    };
    return html`
        <div
            class="segmented ${kind}"
            role="radiogroup"
            aria-labelledby="label-${name}"
            aria-invalid=${isWrong(name)}
            aria-describedby=${describedBy(name)}
        >
            ${values.map(radioOf)}
        </div>
    `;
}

/** The shape of a frame such as "16:9", as large as fits into a square; of any other name, one of dashes. */
function frameIcon(text) {
    const isRatio = RATIO.test(text);
    const [width, height] = isRatio ? text.split(":").map(Number) : [1, 1];
    const scale = 20 / Math.max(width, height);
    const [x, y] = [12 - (width * scale) / 2, 12 - (height * scale) / 2];
    return html`
        <svg class="form-frame ${isRatio ? "" : "form-free"}" viewBox="0 0 24 24" aria-hidden="true">
            <rect x=${x} y=${y} width=${width * scale} height=${height * scale} rx="1.5"></rect>
        </svg>
    `;
}

function selectView(field, values) {
    const { name } = field;
    const chosen = valueOf(field) ?? field.default;
    const options = isGiven(field.default) ? values : [null, ...values];
    const optionView = (value) => html`<option .selected=${chosen === value}>${choiceText(value ?? "–")}</option>`;
    return html`
        ${headView(field)}
        <select
            id="field-${name}"
            aria-invalid=${isWrong(name)}
            aria-describedby=${describedBy(name)}
            @change=${({ target }) => edit(field, options[target.selectedIndex] ?? undefined)}
        >
            ${options.map(optionView)}
        </select>
    `;
}

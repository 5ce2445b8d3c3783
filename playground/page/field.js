/** The parts that each field of the form has, whatever its control: a value, a head, and a sentence on its problem. */

import { focusOn, labelledButton, sizeText } from "./browser.js";
import { differs, fieldNamed, isGiven, isSame, isSecret, isSent, meaningOf, own, problemOf } from "./schema.js";
import { announce, changed, note, state } from "./store.js";
import { directive, Directive } from "./vendor/directive.js";
import { html, noChange, nothing, svg } from "./vendor/lit-html.js";

// Files of one request together: a server takes bodies of 100 MiB, and base64 makes four bytes of three.
const MOST_BYTES = 70_000_000;

const explained = new Set(); // names of fields whose description is open

// Values

/** The value of a field in the form; undefined where it has its default. */
export const valueOf = ({ name }) => own(state.inputs, name);

/** Set a field, or give it back its default; the problem of its old value goes. */
export function edit(field, value) {
    const { name } = field;
    if (name === "image" && value !== state.inputs.image && state.inputs.mask) {
        delete state.inputs.mask;
        announce("The mask was removed with the image that it belonged to.");
    }
    const kept = keptOf(field, value);
    if (kept === undefined) delete state.inputs[name];
    else state.inputs[name] = kept;
    delete state.problems[name];
    changed();
}

/** The value that the form keeps: undefined in place of one that is not sent. */
const keptOf = (field, value) => (isSent(field, value) ? value : undefined);

/** Check a value when its field is left: while it is typed, a number is not yet whole. */
export function leave(field) {
    const value = valueOf(field);
    // An empty required field is no problem yet: others may be filled in first.
    const problem = isGiven(value) ? problemOf(field, value) : null;
    if (problem) state.problems[field.name] = problem;
    changed();
}

/** Draw from an image; why it cannot be, or that it will be, is told. */
export function setImage(file) {
    const field = soughtField("image", "an image to draw from");
    if (field === undefined) return;
    const problem = sizeProblem(file, valueOf(field));
    if (problem !== null) return note(problem);
    const { mask } = state.inputs;
    edit(field, file);
    const isMaskGone = mask && !state.inputs.mask;
    note(`The picture is now the image to draw from${isMaskGone ? "; the mask of the old one is gone" : ""}.`);
}

/** Draw from the seed of a picture from now on, or, if it has none, from the form's or the next; null ends that. */
export function keepSeed(picture) {
    const field = soughtField("seed", "a seed");
    if (field === undefined) return;
    const seed = picture === null ? undefined : (picture.seed ?? valueOf(field));
    state.seedLocked = picture !== null;
    edit(field, seed);
    if (picture === null) announce("Each picture gets a seed of its own.");
    else announce(seed === undefined ? "The next seed stays." : `The next pictures get the seed ${seed}.`);
}

/** The field of an input that not every server has; where it is missing, a note says so. */
function soughtField(name, what) {
    return fieldNamed(state.schema.fields, name) ?? note(`This server has no input for ${what}.`);
}

/** Why a file cannot be sent beside those of the form, of which it replaces one; null when it can. */
export function sizeProblem(file, replaced = null) {
    const others = [...Object.values(state.inputs), ...state.loras.map((lora) => lora.file)];
    const sizes = others.filter((other) => other instanceof Blob && other !== replaced).map(({ size }) => size);
    const sum = sizes.reduce((one, other) => one + other, file.size);
    if (sum <= MOST_BYTES) return null;
    return (
        `With ${file.name} the files would have ${sizeText(sum)}, and a request carries ${sizeText(MOST_BYTES)}; ` +
        "give the address where it lies, or, of a LoRA, its name in the server's library."
    );
}

// All values together

/** @returns {Recipe} of the form as it is now. */
export function snapshot() {
    return { inputs: { ...state.inputs }, loras: state.loras.map((lora) => ({ ...lora })) };
}

/** Put a recipe into the form. Secrets that were typed there stay, as recipes are kept without them. */
export function restore({ inputs, loras }) {
    const secrets = Object.entries(state.inputs).filter(([name]) => isSecret(name, state.schema.fields));
    state.inputs = { ...Object.fromEntries(secrets), ...inputs };
    state.loras = loras.map((lora) => ({ ...lora }));
    state.problems = {};
    changed();
}

// Typed text

/**
 * A binding for the value of a control that is typed into. It sets the text, its first argument, unless the control has
 * one already that means the same, as "1." means 1; the second argument tests this.
 */
export const typed = directive(
    class extends Directive {
        update({ element }, [text, isMeantBy]) {
            const stays = this.isFilled && isMeantBy(element.value);
            this.isFilled = true;
            // lit skips a text that it has set before, but never an object.
            return stays ? noChange : Object(text);
        }
    },
);

/** The binding for the value of a field's control, so that it shows the value that will be sent. */
export function typedText(field, text) {
    return typed(text, (shown) => isSame(keptOf(field, meaningOf(field, shown)), valueOf(field)));
}

// Its parts

/** The line above a control, or with a small control at its end. */
export function headView(field, { end = nothing, isLabel = true } = {}) {
    const { name, label, required } = field;
    const value = valueOf(field);
    const id = `label-${name}`;
    return html`
        <div class="form-head">
            ${isLabel
                ? html`<label class="field-label" id=${id} for="field-${name}">${label}</label>`
                : html`<span class="field-label" id=${id}>${label}</span>`}
            ${required ? html`<span class="hint form-required">required</span>` : nothing} ${explainView(field)}
            <span class="form-space"></span>
            ${differs(field, value) && !(value instanceof Blob) ? resetView(field) : nothing} ${end}
        </div>
    `;
}

function explainView({ name, label, description }) {
    if (!description) return nothing;
    const isOpen = explained.has(name);
    const toggle = () => {
        isOpen ? explained.delete(name) : explained.add(name);
        changed();
    };
    const options = { kind: "icon-button form-small", title: description, opens: `about-${name}`, isOpen };
    return labelledButton(icon("about"), `About ${label}`, toggle, options);
}

function resetView(field) {
    const options = {
        kind: "icon-button form-small form-reset",
        title: `Back to ${isGiven(field.default) ? field.default : "none"}`,
    };
    return labelledButton(icon("reset"), `Reset ${field.label}`, () => restoreDefault(field), options);
}

/** Give a field back its default, and the focus, as the button for this goes. */
export function restoreDefault(field) {
    edit(field, undefined);
    focusField(field);
}

/** The description of a field, while it is open. */
export function aboutView({ name, description }) {
    if (!explained.has(name)) return nothing;
    const withCode = description.split("`").map((part, index) => (index % 2 ? html`<code>${part}</code>` : part));
    return html`<p class="hint form-about" id="about-${name}">${withCode}</p>`;
}

/** The problem of an input, below its control. */
export function problemView(name) {
    return isWrong(name) ? html`<p class="problem" id="problem-${name}">${state.problems[name]}</p>` : nothing;
}

export const isWrong = (name) => Object.hasOwn(state.problems, name);

/** The ids of the texts that tell more about a control. */
export function describedBy(name) {
    const ids = [explained.has(name) && `about-${name}`, isWrong(name) && `problem-${name}`].filter(Boolean);
    return ids.length > 0 ? ids.join(" ") : nothing;
}

/** Focus the control of a field, once the page is rendered; of several, the first. */
export function focusField({ name }) {
    const controls = `:is(#field-${CSS.escape(name)}, [type="radio"], .form-drop .row :is(button, input))`;
    focusOn(`[data-name="${CSS.escape(name)}"] ${controls}`);
}

const ICONS = {
    about: svg`<circle cx="12" cy="12" r="9"></circle><path d="M12 11v5M12 8v.01"></path>`,
    reset: svg`<path d="M4 5v5h5M4.5 10a8 8 0 1 1-.4 4"></path>`,
    locked: svg`<rect x="5" y="11" width="14" height="9" rx="2"></rect><path d="M8 11V8a4 4 0 0 1 8 0v3"></path>`,
    unlocked: svg`<rect x="5" y="11" width="14" height="9" rx="2"></rect><path d="M8 11V7a4 4 0 0 1 7.5-2"></path>`,
    random: svg`<path d="M4 7h3c5 0 5 10 10 10h3M4 17h3q3 0 4-4M13 9q1-2 4-2h3M17 4l3 3-3 3m0 4 3 3-3 3"></path>`,
};

export const icon = (name) => html`
    <svg class="form-icon" viewBox="0 0 24 24" aria-hidden="true">${ICONS[name]}</svg>
`;

/**
 * The form, made of the document alone: a control for every input, by its type.
 */

import { addLora, addTyped, clearTyped, LORAS, lorasAreRight, lorasView } from "./loras.js";
import { megabytes, sizeProblem, triggerWords } from "./loras.js";
import { paintMask } from "./mask.js";
import { differs, idleSentence, isBounded, isGiven, isShown, problemOf } from "./schema.js";
import { announce, changed, state } from "./store.js";
import { html, noChange, nothing, svg } from "./vendor/lit-html.js";

const MOST_SEGMENTS = 5;
const MOST_SEGMENT_CHARACTERS = 24; // of all of them: they stand in one row
const COLUMNS = 44; // characters in a line of a text field, about
const RATIO = /^\d+:\d+$/;
const PICTURES = /image|mask|photo|picture/;
const LORA_FILES = /\.(safetensors|tar|gz|tgz|zip)$/i;

const explained = new Set(); // names of fields whose description is open
let painting = false; // whether the dialog for a mask is open, or about to be
const previews = new Map(); // by field, the file that is shown and its address within the page

/** The whole form, without the bar that draws: its events `submit` go up to whoever draws. */
export function formView() {
    const { fields, groups } = state.schema;
    const shown = new Set(fields.filter((field) => isShown(field, state.inputs)).map(({ name }) => name));
    const others = Object.entries(state.problems).filter(([name]) => !shown.has(name));
    return html`
        <form id="form" class="form" aria-label="Inputs" novalidate autocomplete="off" @submit=${stay}>
            ${others.length > 0
                ? html`<ul class="notice form-problems">
                      ${others.map(([name, sentence]) => html`<li><code>${name}</code>: ${sentence}</li>`)}
                  </ul>`
                : nothing}
            ${groups.map((group) => groupView(group, groups.length === 1))}
        </form>
    `;
}

/** Nothing is sent as forms are, which would load another page. */
function stay(event) {
    event.preventDefault();
}

/**
 * Look at what is shown before it is sent: what is wrong is told at its field, and the first such field gets the focus.
 *
 * @returns {boolean} whether it can be sent
 */
export function checkForm() {
    state.problems = {};
    const added = addTyped();
    for (const field of state.schema.fields.filter((field) => isShown(field, state.inputs))) check(field);
    changed();
    if (added && lorasAreRight() && Object.keys(state.problems).length === 0) return true;
    queueMicrotask(focusProblem); // after the page is rendered
    return false;
}

/** Focus the first field that is marked as wrong; false where there is none. */
export function focusProblem() {
    const control = document.querySelector('#form [aria-invalid="true"]');
    if (control === null) return false;
    const around = control.closest("details");
    if (around) around.open = true;
    (control.querySelector("input") ?? control).focus(); // of a group of radio buttons, the first
    return true;
}

/** Every input as it is by default. */
export function reset() {
    clearTyped();
    Object.assign(state, { inputs: {}, loras: [], problems: {}, seedLocked: false });
    announce("All inputs are as they were at first.");
}

function groupView(group, alone) {
    const fields = group.fields.filter((field) => isShown(field, state.inputs));
    const hidden = group.name === "size" && fields.length === 0;
    if (fields.length === 0 && !hidden) return nothing;
    const title = alone && group.name === "other" ? "Inputs" : group.title;
    const repeated = fields.length === 1 && fields[0].label === title;
    return html`
        <fieldset class="form-group">
            <legend class=${repeated ? "visually-hidden" : "form-legend"}>${title}</legend>
            ${hidden ? html`<p class="hint">The image's own size counts.</p>` : nothing}
            ${group.name === "loras" ? loraFields(fields) : fields.map(fieldView)}
        </fieldset>
    `;
}

/** The list stands for one input; the second input of this kind is out of the way, for those who know it. */
function loraFields(fields) {
    const list = fields.find(({ name }) => name === LORAS);
    if (list === undefined) return fields.map(fieldView);
    const scale = fields.find(({ name }) => name === "lora_scale");
    const extra = fields.filter((field) => field !== list && field !== scale);
    return html`
        ${lorasView()} ${problemView(LORAS)}
        ${scale && (state.loras.length > 0 || differs(scale, state.inputs[scale.name])) ? fieldView(scale) : nothing}
        ${extra.length > 0
            ? html`<details class="form-more" ?open=${extra.some((field) => differs(field, state.inputs[field.name]))}>
                  <summary>A second LoRA input</summary>
                  <div class="stack">${extra.map(fieldView)}</div>
              </details>`
            : nothing}
    `;
}

function fieldView(field) {
    const { name, description } = field;
    const idle = idleSentence(field, state.inputs);
    const about = html`<p class="hint form-about" id="about-${name}">${withCode(description)}</p>`;
    return html`
        <div class="field form-field" data-name=${name}>
            ${controlOf(field)(field)}
            ${explained.has(name) ? about : nothing}
            ${idle ? html`<p class="hint">${idle}</p>` : nothing} ${problemView(name)}
        </div>
    `;
}

function controlOf(field) {
    if (choices(field)) return choiceView;
    if (field.format === "uri") return fileView;
    if (field.type === "boolean") return switchView;
    if (field.name === "seed" && field.type === "integer") return seedView;
    if (field.type === "integer" || field.type === "number") return isBounded(field) ? sliderView : numberRow;
    return textView;
}

/** What may be chosen; a switch could not say that a required one was switched off. */
function choices({ enum: values, type, required }) {
    return values ?? (type === "boolean" && required ? [true, false] : null);
}

/** The line above a control, or with a small control at its end. */
function headView(field, end = nothing, labelled = true) {
    const { name, label, description, required } = field;
    const explain = () => {
        explained.has(name) ? explained.delete(name) : explained.add(name);
        changed();
    };
    return html`
        <div class="form-head">
            ${labelled
                ? html`<label class="field-label" id="label-${name}" for="field-${name}">${label}</label>`
                : html`<span class="field-label" id="label-${name}">${label}</span>`}
            ${required ? html`<span class="hint form-required">required</span>` : nothing}
            ${description
                ? html`<button
                      class="icon-button form-small"
                      type="button"
                      aria-label="About ${label}"
                      title=${description}
                      aria-expanded=${explained.has(name)}
                      aria-controls=${explained.has(name) ? `about-${name}` : nothing}
                      @click=${explain}
                  >
                      ${icon("about")}
                  </button>`
                : nothing}
            <span class="form-space"></span>
            ${differs(field, state.inputs[name]) && !(state.inputs[name] instanceof Blob)
                ? html`<button
                      class="icon-button form-small form-reset"
                      type="button"
                      aria-label="Reset ${label}"
                      title="Back to ${isGiven(field.default) ? field.default : "none"}"
                      @click=${() => edit(field, undefined)}
                  >
                      ${icon("reset")}
                  </button>`
                : nothing}
            ${end}
        </div>
    `;
}

function problemView(name) {
    const sentence = state.problems[name];
    return sentence ? html`<p class="problem" id="problem-${name}">${sentence}</p>` : nothing;
}

function textView(field) {
    const { name, type } = field;
    const isJson = type === "array" || type === "object";
    const value = state.inputs[name] ?? field.default ?? "";
    const text = isJson && value !== "" ? JSON.stringify(value) : String(value);
    const least = name === "prompt" ? 3 : 1;
    const onInput = ({ target }) => (isJson ? editJson(field, target) : edit(field, target.value));
    return html`
        ${headView(field)}
        <textarea
            id="field-${name}"
            class="form-text"
            rows=${Math.max(least, rowsOf(text))}
            ?required=${field.required}
            aria-invalid=${name in state.problems}
            aria-describedby=${describedBy(name)}
            .value=${typedText(field, text)}
            @input=${onInput}
            @blur=${() => leave(field)}
        ></textarea>
        ${name === "prompt" ? wordsView(field, text) : nothing}
    `;
}

/** The words that wake the chosen LoRAs, of those that are known. */
function wordsView(field, prompt) {
    const words = [...new Set(state.loras.flatMap(({ path }) => triggerWords(path)))];
    if (words.length === 0) return nothing;
    const toggle = (word) => edit(field, prompt.includes(word) ? withoutWord(prompt, word) : withWord(prompt, word));
    return html`
        <div class="row form-words" role="group" aria-label="Trigger words">
            ${words.map(
                (word) => html`
                    <button
                        class="chip"
                        type="button"
                        aria-label="Add ${word} to the prompt"
                        aria-pressed=${prompt.includes(word)}
                        @click=${() => toggle(word)}
                    >
                        ${word}
                    </button>
                `,
            )}
        </div>
    `;
}

function numberRow(field) {
    return html`${headView(field, numberView(field))}`;
}

function sliderView(field) {
    const { name, minimum, maximum, step } = field;
    return html`
        ${headView(field, numberView(field))}
        <input
            class="form-range"
            type="range"
            min=${minimum}
            max=${maximum}
            step=${step}
            aria-labelledby="label-${name}"
            .value=${Object(String(state.inputs[name] ?? field.default ?? minimum))}
            @input=${({ target }) => edit(field, Number(target.value))}
        />
    `;
}

function numberView(field) {
    const { name, minimum, maximum, step, type } = field;
    const onInput = ({ target }) => edit(field, target.value === "" ? undefined : Number(target.value));
    return html`
        <input
            id="field-${name}"
            class="form-number"
            type="number"
            inputmode=${unsignedMode(field)}
            min=${minimum ?? nothing}
            max=${maximum ?? nothing}
            step=${type === "number" && minimum === null ? "any" : step}
            placeholder=${field.default ?? (name === "seed" ? "random" : "none")}
            ?required=${field.required}
            aria-invalid=${name in state.problems}
            aria-describedby=${describedBy(name)}
            .value=${typedText(field, String(state.inputs[name] ?? ""))}
            @input=${onInput}
            @blur=${() => leave(field)}
        />
    `;
}

/** The keyboard of a phone; both of these have no minus. */
function unsignedMode({ type, minimum }) {
    if (minimum === null || minimum < 0) return nothing;
    return type === "integer" ? "numeric" : "decimal";
}

function seedView(field) {
    const lock = () => {
        state.seedLocked = !state.seedLocked;
        const picture = state.pictures.find(({ id }) => id === state.selected);
        edit(field, state.seedLocked ? (picture?.seed ?? state.inputs.seed) : undefined);
    };
    const locked = state.seedLocked ? "The seed stays; press to let it change" : "Keep the seed of the picture";
    return html`
        ${headView(field)}
        <div class="form-seed">
            ${numberView(field)}
            <button
                class="icon-button"
                type="button"
                aria-label="Lock the seed"
                title=${locked}
                aria-pressed=${state.seedLocked}
                @click=${lock}
            >
                ${icon(state.seedLocked ? "locked" : "unlocked")}
            </button>
            <button
                class="icon-button"
                type="button"
                aria-label="Random seed"
                title="A new seed each time"
                @click=${() => edit(field, undefined)}
            >
                ${icon("random")}
            </button>
        </div>
    `;
}

function switchView(field) {
    const { name } = field;
    const control = html`
        <input
            id="field-${name}"
            class="form-switch"
            type="checkbox"
            aria-invalid=${name in state.problems}
            aria-describedby=${describedBy(name)}
            .checked=${state.inputs[name] ?? field.default ?? false}
            @change=${({ target }) => edit(field, target.checked)}
        />
    `;
    return headView(field, control);
}

function choiceView(field) {
    const values = choices(field);
    const texts = values.map(choiceText);
    if (texts.filter((text) => RATIO.test(text)).length > 2) return framesView(field, values);
    const isShort = values.length <= MOST_SEGMENTS && texts.join("").length <= MOST_SEGMENT_CHARACTERS;
    return isShort ? segmentsView(field, values) : selectView(field, values);
}

function segmentsView(field, values) {
    const labels = values.map((value) => html`<label>${radioView(field, value)}${choiceText(value)}</label>`);
    return headView(field, radiosView(field, "form-segments", labels), false);
}

function framesView(field, values) {
    const labels = values.map(
        (value) => html`<label>${radioView(field, value)}${frameIcon(value)}<span>${value}</span></label>`,
    );
    return html`${headView(field, nothing, false)}${radiosView(field, "form-frames", labels)}`;
}

function radiosView({ name }, kind, labels) {
    return html`
        <div
            class="segmented ${kind}"
            role="radiogroup"
            aria-labelledby="label-${name}"
            aria-invalid=${name in state.problems}
            aria-describedby=${describedBy(name)}
        >
            ${labels}
        </div>
    `;
}

function radioView(field, value) {
    const { name } = field;
    return html`
        <input
            type="radio"
            name="field-${name}"
            .checked=${(state.inputs[name] ?? field.default) === value}
            @change=${() => edit(field, value)}
        />
    `;
}

function selectView(field, values) {
    const { name } = field;
    const chosen = state.inputs[name] ?? field.default;
    const options = field.default === null ? [null, ...values] : values;
    return html`
        ${headView(field)}
        <select
            id="field-${name}"
            aria-invalid=${name in state.problems}
            aria-describedby=${describedBy(name)}
            @change=${({ target }) => edit(field, options[target.selectedIndex] ?? undefined)}
        >
            ${options.map((value) => html`<option .selected=${chosen === value}>${choiceText(value ?? "–")}</option>`)}
        </select>
    `;
}

function choiceText(value) {
    return { true: "Yes", false: "No" }[value] ?? String(value);
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

function fileView(field) {
    const { name } = field;
    const value = state.inputs[name];
    return html`
        ${headView(field, nothing, false)}
        <div
            class="form-drop"
            role="group"
            aria-labelledby="label-${name}"
            @dragover=${dragOver}
            @dragleave=${({ currentTarget }) => currentTarget.classList.remove("form-over")}
            @drop=${(event) => drop(field, event)}
        >
            ${value instanceof Blob ? chosenView(field, value) : emptyView(field, value)}
        </div>
    `;
}

function chosenView(field, file) {
    const address = previewOf(field.name, file);
    const picture = html`<img class="thumb form-thumb" src=${address} alt="${field.label}: ${file.name}" />`;
    return html`
        ${file.type.startsWith("image/") ? picture : nothing}
        <div class="form-chosen">
            <div class="form-head">
                <p class="form-name">${file.name} <span class="quiet">${megabytes(file.size)}</span></p>
                <button
                    class="icon-button form-small"
                    type="button"
                    aria-label="Remove ${field.label}"
                    title="Remove"
                    @click=${() => {
                        edit(field, undefined);
                        focusFile(field);
                    }}
                >
                    ✕
                </button>
            </div>
            <div class="row">${paintView(field)} ${uploadView(field, "Replace")}</div>
        </div>
    `;
}

function emptyView(field, address) {
    previewOf(field.name, null);
    const { name, label } = field;
    const isMask = name === "mask";
    return html`
        <div class="row">
            ${paintView(field)} ${uploadView(field, isMask ? "Upload" : "Choose a file")}
            <span class="hint">or drop it here, or paste it</span>
        </div>
        ${isMask && typeof state.inputs.image === "string"
            ? html`<p class="hint">On an image at an address no mask can be painted here; upload one.</p>`
            : nothing}
        <input
            type="url"
            id="field-${name}"
            class="form-address"
            aria-label="${label}: address"
            placeholder="Or an address: https://…"
            spellcheck="false"
            aria-invalid=${name in state.problems}
            aria-describedby=${describedBy(name)}
            .value=${typedText(field, address ?? "")}
            @input=${({ target }) => edit(field, target.value.trim())}
            @blur=${() => leave(field)}
        />
    `;
}

function uploadView(field, text) {
    const { name, label } = field;
    const choose = ({ target }) => {
        take(field, target.files[0]);
        target.value = ""; // so that the same file can be chosen again
        focusFile(field);
    };
    return html`
        <span class="form-upload">
            <input
                class="visually-hidden"
                type="file"
                id="file-${name}"
                accept=${PICTURES.test(name) ? "image/*" : nothing}
                aria-label="${label}: ${text}"
                @change=${choose}
            />
            <label class="button" for="file-${name}">${text}</label>
        </span>
    `;
}

function paintView(field) {
    const { image, mask } = state.inputs;
    if (field.name !== "mask" || !(image instanceof Blob)) return nothing;
    const paint = async () => {
        if (painting) return; // pressed again while a large image is opened
        painting = true;
        try {
            const painted = await paintMask(image, mask instanceof Blob ? mask : null);
            if (painted && state.inputs.image === image) edit(field, painted);
            focusFile(field);
        } catch {
            state.problems.mask = "The image cannot be opened here, so no mask can be painted on it; upload one.";
            changed();
        } finally {
            painting = false;
        }
    };
    return html`<button class="button" type="button" @click=${paint}>Paint</button>`;
}

/** The controls of a file are others once there is one, so the focus goes to the first of these. */
function focusFile({ name }) {
    const controls = `[data-name="${CSS.escape(name)}"] .form-drop .row :is(button, input)`;
    queueMicrotask(() => document.querySelector(controls)?.focus());
}

/** A file's address within the page; that of the one before it, which would be held in memory, is given up. */
function previewOf(name, file) {
    const before = previews.get(name);
    if (before?.file === file) return before.address;
    if (before) URL.revokeObjectURL(before.address);
    previews.delete(name);
    if (file === null) return null;
    const address = URL.createObjectURL(file);
    previews.set(name, { file, address });
    return address;
}

function dragOver(event) {
    event.preventDefault(); // else nothing can be dropped
    event.currentTarget.classList.add("form-over");
}

function drop(field, event) {
    event.preventDefault();
    event.currentTarget.classList.remove("form-over");
    const { files } = event.dataTransfer;
    const address = event.dataTransfer.getData("text/uri-list");
    if (files.length > 0) take(field, files[0]);
    else if (/^https?:/.test(address)) edit(field, address);
}

/** Files that are pasted anywhere on the page; text goes where it is pasted. */
function paste(event) {
    const file = event.clipboardData?.files[0];
    if (!file || !state.schema || document.querySelector("dialog[open]")) return;
    // A cell of a spreadsheet brings a picture of itself along with its text.
    if (event.clipboardData.types.includes("text/plain") && event.target.closest?.("textarea, input")) return;
    event.preventDefault();
    if (LORA_FILES.test(file.name)) return void addLora(file);
    const shown = state.schema.fields.filter((field) => field.format === "uri" && isShown(field, state.inputs));
    const own = event.target.closest?.("[data-name]")?.dataset.name;
    const field = shown.find(({ name }) => name === own) ?? shown[0];
    if (field) take(field, file);
}
document.addEventListener("paste", paste);

function take(field, file) {
    if (!file) return;
    const isPicture = !PICTURES.test(field.name) || file.type.startsWith("image/");
    const unknown = `${file.name} is of no kind that this browser knows as a picture.`;
    const problem = isPicture ? sizeProblem(file, state.inputs[field.name]) : unknown;
    if (problem === null) return edit(field, file);
    state.problems[field.name] = problem;
    changed();
}

/** Set an input, or give it back its default; what was said of its value before is over. */
function edit(field, value) {
    const { name } = field;
    if (name === "image" && value !== state.inputs.image && state.inputs.mask) {
        delete state.inputs.mask;
        announce("The mask was removed with the image that it belonged to.");
    }
    if (field.required ? isGiven(value) : differs(field, value)) state.inputs[name] = value;
    else delete state.inputs[name];
    delete state.problems[name];
    changed();
}

function editJson(field, target) {
    let value;
    try {
        value = target.value.trim() === "" ? undefined : JSON.parse(target.value);
        target.setCustomValidity("");
    } catch {
        target.setCustomValidity("no JSON"); // for `check`; people are told another sentence
    }
    edit(field, value);
}

function check(field) {
    const control = document.getElementById(`field-${field.name}`);
    const { badInput, customError } = control?.validity ?? {};
    const example = field.type === "array" ? '["one", "two"]' : '{"name": "value"}';
    const problem = customError
        ? `${field.label} must be JSON, such as ${example}.`
        : problemOf(field, badInput ? NaN : state.inputs[field.name]);
    if (problem) state.problems[field.name] = problem;
}

/** What was typed is looked at when the field is left: before, a number is not yet whole. */
function leave(field) {
    // A required field is not wrong as long as others are filled in first.
    if (isGiven(state.inputs[field.name]) || !field.required) check(field);
    changed();
}

/**
 * What is bound to the value of a typed field. While it has the focus, or is wrong, it keeps what was typed: a number
 * that is being written, such as "1.", would lose its point. lit sets an object, unlike a text, at each rendering, also
 * where the same was set last: something else may have been typed since.
 */
function typedText({ name }, text) {
    const id = `field-${name}`;
    return document.activeElement?.id === id || name in state.problems ? noChange : Object(text);
}

function describedBy(name) {
    const ids = [explained.has(name) && `about-${name}`, name in state.problems && `problem-${name}`].filter(Boolean);
    return ids.length > 0 ? ids.join(" ") : nothing;
}

/** Lines that a text takes; browsers that grow a field by its content need none of this. */
function rowsOf(text) {
    return text.split("\n").reduce((rows, line) => rows + Math.max(1, Math.ceil(line.length / COLUMNS)), 0);
}

/** A description with its `code` marked. */
function withCode(text) {
    return text.split("`").map((part, index) => (index % 2 ? html`<code>${part}</code>` : part));
}

function withWord(prompt, word) {
    return [prompt.trim(), word].filter(Boolean).join(", ");
}

function withoutWord(prompt, word) {
    const at = prompt.indexOf(word);
    const [before, after] = [prompt.slice(0, at), prompt.slice(at + word.length)];
    return `${before.replace(/,?\s*$/, "")}${after}`.replace(/^[,\s]+/, "");
}

const ICONS = {
    about: svg`<circle cx="12" cy="12" r="9"></circle><path d="M12 11v5M12 8v.01"></path>`,
    reset: svg`<path d="M4 5v5h5M4.5 10a8 8 0 1 1-.4 4"></path>`,
    locked: svg`<rect x="5" y="11" width="14" height="9" rx="2"></rect><path d="M8 11V8a4 4 0 0 1 8 0v3"></path>`,
    unlocked: svg`<rect x="5" y="11" width="14" height="9" rx="2"></rect><path d="M8 11V7a4 4 0 0 1 7.5-2"></path>`,
    random: svg`<path d="M4 7h3c5 0 5 10 10 10h3M4 17h3q3 0 4-4M13 9q1-2 4-2h3M17 4l3 3-3 3m0 4 3 3-3 3"></path>`,
};

function icon(name) {
    return html`<svg class="form-icon" viewBox="0 0 24 24" aria-hidden="true">${ICONS[name]}</svg>`;
}

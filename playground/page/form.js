/** The form, made of the document alone: a control for every input, in groups. */

import { afterRender } from "./browser.js";
import { controlView } from "./controls.js";
import { aboutView, problemView, valueOf } from "./field.js";
import { fileView } from "./file_field.js";
import { LORAS } from "./lora.js";
import { addTyped, lorasAreRight, lorasView, wordsView } from "./loras.js";
import { differs, fieldNamed, idleSentence, isShown, problemsOf } from "./schema.js";
import { announce, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";
import { repeat } from "./vendor/repeat.js";

/** The whole form, without the button that submits it; main.js handles its event `submit`. */
export function formView() {
    const { fields, groups } = state.schema;
    const shown = new Set(fields.filter((field) => isShown(field, state.inputs)).map(({ name }) => name));
    const others = Object.entries(state.problems).filter(([name]) => !shown.has(name));
    return html`
        <form id="form" class="form" aria-label="Inputs" novalidate autocomplete="off">
            ${others.length > 0
                ? html`<ul class="notice form-problems">
                      ${others.map(([name, sentence]) => html`<li><code>${name}</code>: ${sentence}</li>`)}
                  </ul>`
                : nothing}
            ${groups.map((group) => groupView(group, groups.length === 1))}
        </form>
    `;
}

/** Whether the form can be sent; if not, each wrong field says why, and the first one gets the focus. */
export function checkForm() {
    state.problems = problemsOf(state.inputs, state.schema.fields);
    const isAdded = addTyped();
    const isRight = isAdded && lorasAreRight() && Object.keys(state.problems).length === 0;
    if (!isRight) afterRender(focusProblem);
    return isRight;
}

/** Focus the first field that is marked as wrong, if there is one. */
export function focusProblem() {
    const control = document.querySelector('#form [aria-invalid="true"]');
    if (control === null) return;
    const around = control.closest("details");
    if (around) around.open = true;
    (control.querySelector("input") ?? control).focus(); // of a group of radio buttons, the first
}

/** Give every input its default. */
export function reset() {
    Object.assign(state, { inputs: {}, loras: [], typedLora: "", problems: {}, seedLocked: false });
    announce("All inputs are as they were at first.");
}

function groupView(group, isAlone) {
    const fields = group.fields.filter((field) => isShown(field, state.inputs));
    const isIdle = group.name === "size" && fields.length === 0;
    if (fields.length === 0 && !isIdle) return nothing;
    const title = isAlone && group.name === "other" ? "Inputs" : group.title;
    const isRepeated = fields.length === 1 && fields[0].label === title;
    return html`
        <fieldset class="form-group">
            <legend class=${isRepeated ? "visually-hidden" : "form-legend"}>${title}</legend>
            ${isIdle ? html`<p class="hint">The image's own size counts.</p>` : nothing}
            ${group.name === "loras" ? loraFields(fields) : fieldViews(fields)}
        </fieldset>
    `;
}

/** The list of LoRAs in place of its input, and the second input for LoRAs folded away. */
function loraFields(fields) {
    if (!fieldNamed(fields, LORAS)) return fieldViews(fields);
    const isSet = (field) => differs(field, valueOf(field));
    const scale = fields.filter((field) => field.name === "lora_scale" && (state.loras.length > 0 || isSet(field)));
    const extra = fields.filter(({ name }) => name !== LORAS && name !== "lora_scale");
    return html`
        ${lorasView()} ${fieldViews(scale)}
        ${extra.length > 0
            ? html`<details class="form-more" ?open=${extra.some(isSet)}>
                  <summary>A second LoRA input</summary>
                  <div class="stack">${fieldViews(extra)}</div>
              </details>`
            : nothing}
    `;
}

/** Each field keeps its elements, and with them the focus, while others come and go. */
const fieldViews = (fields) => repeat(fields, ({ name }) => name, fieldView);

function fieldView(field) {
    const { name, format } = field;
    const idle = idleSentence(field, state.inputs);
    return html`
        <div class="field form-field" data-name=${name}>
            ${format === "uri" ? fileView(field) : controlView(field)}
            ${name === "prompt" && field.type === "string" ? wordsView(field) : nothing} ${aboutView(field)}
            ${idle ? html`<p class="hint">${idle}</p>` : nothing} ${problemView(name)}
        </div>
    `;
}

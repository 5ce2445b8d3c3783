/** The control of a field for a file: chosen, dropped, pasted, painted, or an address. */

import { dropTarget, fileButton, isPicture, labelledButton, sizeText, urlOf } from "./browser.js";
import { describedBy, edit, focusField, headView, isWrong, leave } from "./field.js";
import { restoreDefault, sizeProblem, typedText, valueOf } from "./field.js";
import { isLoraFile } from "./lora.js";
import { addLora } from "./loras.js";
import { paintMask } from "./mask.js";
import { fieldNamed, isShown, meaningOf } from "./schema.js";
import { change, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

const PICTURES = /image|mask|photo|picture/; // in names of inputs: for these, the browser offers pictures first

let painting = false; // whether the dialog for a mask is open, or about to be

export function fileView(field) {
    const value = valueOf(field);
    const { dragover, dragleave, drop } = dropTarget("form-over", (transfer) => takeDropped(field, transfer));
    return html`
        ${headView(field, { isLabel: false })}
        <div
            class="form-drop"
            role="group"
            aria-labelledby="label-${field.name}"
            @dragover=${dragover}
            @dragleave=${dragleave}
            @drop=${drop}
        >
            ${value instanceof Blob ? chosenView(field, value) : emptyView(field, value)}
        </div>
    `;
}

/** Take a pasted file: a LoRA's into the list, another one into the named field, or else the first that takes files. */
export function takePasted(file, name) {
    if (isLoraFile(file)) return void addLora(file);
    const shown = state.schema.fields.filter((field) => field.format === "uri" && isShown(field, state.inputs));
    const field = fieldNamed(shown, name) ?? shown[0];
    if (field) take(field, file);
}

function chosenView(field, file) {
    const picture = html`<img class="thumb form-thumb" src=${urlOf(file)} alt="${field.label}: ${file.name}" />`;
    const style = { kind: "icon-button form-small", title: "Remove" };
    return html`
        ${isPicture(file) ? picture : nothing}
        <div class="form-chosen">
            <div class="form-head">
                <p class="form-name">${file.name} <span class="quiet">${sizeText(file.size)}</span></p>
                ${labelledButton("✕", `Remove ${field.label}`, () => restoreDefault(field), style)}
            </div>
            <div class="row">${paintView(field)} ${uploadView(field, "Replace")}</div>
        </div>
    `;
}

function emptyView(field, address) {
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
            aria-invalid=${isWrong(name)}
            aria-describedby=${describedBy(name)}
            .value=${typedText(field, address ?? field.default ?? "")}
            @input=${({ target }) => edit(field, meaningOf(field, target.value))}
            @blur=${() => leave(field)}
        />
    `;
}

function uploadView(field, text) {
    const { name, label } = field;
    return fileButton(text, {
        id: `file-${name}`,
        label: `${label}: ${text}`,
        accept: PICTURES.test(name) ? "image/*" : nothing,
        take: ([file]) => {
            take(field, file);
            focusField(field); // its controls are others once there is a file
        },
    });
}

function paintView(field) {
    const { image } = state.inputs;
    if (field.name !== "mask" || !(image instanceof Blob)) return nothing;
    return html`<button class="button" type="button" @click=${() => paint(field, image)}>Paint</button>`;
}

async function paint(field, image) {
    if (painting) return; // pressed again while a large image is opened
    painting = true;
    try {
        const mask = valueOf(field);
        const painted = await paintMask(image, mask instanceof Blob ? mask : null);
        if (painted && state.inputs.image === image) edit(field, painted);
        focusField(field);
    } catch {
        const mask = "The image cannot be opened here, so no mask can be painted on it; upload one.";
        change(state.problems, { mask });
    } finally {
        painting = false;
    }
}

function takeDropped(field, transfer) {
    const address = transfer.getData("text/uri-list");
    if (transfer.files.length > 0) take(field, transfer.files[0]);
    else if (/^https?:/.test(address)) edit(field, address);
}

function take(field, file) {
    if (!file) return;
    const problem = sizeProblem(file, valueOf(field));
    if (problem === null) edit(field, file);
    else change(state.problems, { [field.name]: problem });
}

/** Two pictures beside each other, or one over the other, and the inputs that differ. */

import { focusOn, radioView, slider } from "./browser.js";
import { fieldOf, imageView, inputOf, loraText, nameOf, sizeStyle } from "./pictures.js";
import { jsonText } from "./schema.js";
import { change, selectedPicture, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

const view = {
    wiping: false, // the two are compared one over the other
    divider: 50, // the first is seen up to here, in percent
};

/** The button that begins a comparison: at once where there are two pictures, else one is chosen first. */
export function compareButton() {
    const begin = () => {
        const picture = selectedPicture();
        const others = state.pictures.filter((other) => other !== picture);
        if (others.length === 1) state.compare = others[0].id;
        change(state, { selected: picture.id, picking: others.length > 1 && !state.picking });
    };
    return html`
        <button
            class="button gallery-compare"
            aria-pressed=${state.picking}
            ?disabled=${state.pictures.length < 2}
            @click=${begin}
        >
            Compare
        </button>
    `;
}

/** Escape ends the choice, and then goes no further: elsewhere on the page it cancels. */
export function leavePicking(event) {
    if (event.key !== "Escape" || !state.picking) return;
    event.stopPropagation();
    change(state, { picking: false });
}

/** Show one picture again, instead of two. */
export function closeCompare() {
    Object.assign(state, { compare: null, picking: false });
    focusOn(".gallery-compare");
}

/** Two pictures, in the frame of the first one's shape, and the inputs that differ. */
export function compareView(first, second) {
    return html`
        <div class="row gallery-bar">
            <fieldset class="segmented">
                <legend class="visually-hidden">How they are compared</legend>
                ${radioView("gallery-mode", "Side by side", !view.wiping, () => change(view, { wiping: false }))}
                ${radioView("gallery-mode", "Wipe", view.wiping, () => change(view, { wiping: true }))}
            </fieldset>
            <button class="button quiet" aria-label="Close comparison" @click=${closeCompare}>Close</button>
        </div>
        ${view.wiping ? wipeView(first, second) : pairView(first, second)} ${differencesView(first, second)}
    `;
}

function pairView(first, second) {
    const figureView = (picture, letter) => html`
        <figure>
            ${frameView(picture)}
            <figcaption class="hint">${letter}${picture.seed === null ? nothing : `, seed ${picture.seed}`}</figcaption>
        </figure>
    `;
    return html`
        <div class="gallery-pair" .style=${sizeStyle(first)}>${figureView(first, "A")} ${figureView(second, "B")}</div>
    `;
}

function wipeView(first, second) {
    const label = "How much of A is shown, in percent";
    const move = (divider) => change(view, { divider });
    const divider = slider({ minimum: 0, maximum: 100, step: 0.5 }, { label, value: view.divider, set: move });
    return html`
        <div class="gallery-wipe" .style="${sizeStyle(first)}; --gallery-divider: ${view.divider}%">
            <div class="gallery-layers">${[first, second].map(frameView)}</div>
            <div class="gallery-slide"><span>A</span> ${divider} <span>B</span></div>
        </div>
    `;
}

const frameView = (picture) => imageView(picture, "gallery-frame", nameOf(picture));

function differencesView(first, second) {
    const rows = differences(first, second);
    if (rows.length === 0) return html`<p class="hint">Both were drawn from the same inputs.</p>`;
    const rowView = ({ label, texts }) => html`
        <tr>
            <th scope="row">${label}</th>
            ${texts.map((text) => html`<td>${text}</td>`)}
        </tr>
    `;
    return html`
        <table class="gallery-differences">
            <caption class="visually-hidden">
                What differs between their inputs
            </caption>
            <thead>
                <tr>
                    <th scope="col"><span class="visually-hidden">Input</span></th>
                    <th scope="col">A</th>
                    <th scope="col">B</th>
                </tr>
            </thead>
            <tbody>
                ${rows.map(rowView)}
            </tbody>
        </table>
    `;
}

/** @returns {{label: string, texts: [string, string]}[]} the inputs in which two pictures differ. */
function differences(first, second) {
    const both = [first, second];
    const names = new Set(both.flatMap(({ recipe }) => Object.keys(recipe.inputs)));
    const loras = both.map(({ recipe }) => recipe.loras.map(loraText).join(", ") || "none");
    const rows = [...names].map((name) => ({
        label: fieldOf(name)?.label ?? name,
        texts: both.map((picture) => valueText(inputOf(picture, name))),
    }));
    return [...rows, { label: "LoRAs", texts: loras }].filter(({ texts: [one, other] }) => one !== other);
}

function valueText(value) {
    if (value === undefined || value === null) return "none";
    if (value instanceof Blob) return `${value.name ?? "a file"} (${value.size} bytes)`;
    if (typeof value === "boolean") return value ? "yes" : "no";
    return jsonText(value);
}

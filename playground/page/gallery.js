/** The stage: the selected picture as large as there is room, its actions, and pictures from elsewhere. */

import { copyText, dropTarget, isPicture, sizeText, urlOf } from "./browser.js";
import { compareButton, compareView, leavePicking } from "./compare.js";
import { draw } from "./draw.js";
import { keepSeed, restore, setImage, snapshot } from "./field.js";
import { hasEnded } from "./jobs.js";
import { readMetadata, recipeOf } from "./metadata.js";
import { fieldOf, imageView, inputOf, loraText, promptOf, sizeOf, sizeStyle } from "./pictures.js";
import { announce, comparedPicture, note, selectedPicture, state } from "./store.js";
import { removePicture } from "./strip.js";
import { html, nothing } from "./vendor/lit-html.js";

// Words that the miniature has learnt, too.
const EXAMPLES = ["a red fox in the snow", "a blue robot in the desert", "a purple mushroom in the forest"];
const FORMATS = { "image/webp": "WebP", "image/jpeg": "JPEG", "image/png": "PNG" };
const { dragover, dragleave, drop } = dropTarget("gallery-dropping", takeDropped);

let copied = null; // the id of the picture whose seed was copied last

/** The selected picture, or two to compare, or a hint where there is none. Takes pictures dropped on it. */
export function stageView() {
    const picture = selectedPicture();
    const other = comparedPicture();
    const shown = other === undefined ? pictureView : compareView;
    return html`
        <div class="gallery-stage" @dragover=${dragover} @dragleave=${dragleave} @drop=${drop} @keydown=${leavePicking}>
            ${picture === null ? emptyView() : shown(picture, other)}
        </div>
    `;
}

function pictureView(picture) {
    const { blob, name, recipe, seed } = picture;
    const drawAgain = () => {
        restore(recipe);
        draw(snapshot()); // with the secrets of the form
    };
    const useAsImage = () => setImage(new File([blob], name, { type: blob.type }));
    const useInputs = () => {
        restore(recipe);
        announce("The form has the inputs of this picture.");
    };
    return html`
        <figure class="gallery-figure" .style=${sizeStyle(picture)}>
            ${imageView(picture, "gallery-picture", promptOf(picture))}
            <figcaption>
                <p class="gallery-prompt">${promptOf(picture)}</p>
                <ul class="gallery-facts">
                    ${seed === null ? nothing : html`<li>Seed ${seed} ${copyView(picture)}</li>`}
                    ${factsOf(picture).map((fact) => html`<li>${fact}</li>`)}
                </ul>
                ${droppedView(picture)}
            </figcaption>
        </figure>
        <div class="row gallery-actions">
            <a class="button" href=${urlOf(blob)} download=${name}>Download</a>
            <button class="button" @click=${drawAgain}>Same again</button>
            <button class="button" @click=${useInputs}>Use its inputs</button>
            <button class="button" @click=${useAsImage}>Use as image</button>
            ${keepSeedButton(picture)} ${compareButton()}
            <button class="button quiet" @click=${() => removePicture(picture)}>Delete</button>
        </div>
        ${state.picking ? html`<p class="notice">Choose the picture to compare it with in the history.</p>` : nothing}
    `;
}

function keepSeedButton(picture) {
    const { seed } = picture;
    const isKept = state.seedLocked && state.inputs.seed === seed;
    const toggle = () => keepSeed(isKept ? null : picture);
    return html`
        <button class="button" aria-pressed=${isKept} ?disabled=${seed === null} @click=${toggle}>Keep seed</button>
    `;
}

function copyView({ id, seed }) {
    const copy = async () => {
        if (!(await copyText(String(seed)))) return note(`This browser lets no page copy here: the seed is ${seed}.`);
        copied = id;
        announce(`The seed ${seed} is copied.`);
    };
    const text = copied === id ? "Copied" : "Copy";
    return html`<button class="button quiet gallery-copy" aria-label="Copy seed" @click=${copy}>${text}</button>`;
}

/** Facts of a picture, in a few words each. */
function factsOf(picture) {
    const { blob, loras, metrics } = picture;
    const size = sizeOf(picture);
    const seconds = metrics.predict_time?.toFixed(1);
    const steps = inputOf(picture, "num_inference_steps");
    const together = metrics.seeds?.length ?? 1;
    return [
        size && `${size.width} × ${size.height} px`,
        inputOf(picture, "model"),
        steps && `${steps} steps`,
        ...loras.map(({ name, path, scale }) => loraText({ path: name ?? path, scale })),
        seconds && (together > 1 ? `${seconds} s for ${together}` : `${seconds} s`),
        `${FORMATS[blob.type] ?? blob.type}, ${sizeText(blob.size)}`,
    ].filter(Boolean);
}

function droppedView({ metrics: { safety, seeds } }) {
    const count = safety?.dropped?.length ?? 0;
    if (count === 0) return nothing;
    const of = seeds?.length > count ? ` of ${seeds.length}` : "";
    const pictures = count === 1 ? `1 picture${of} was` : `${count} pictures${of} were`;
    return html`<p class="hint">${pictures} kept back by the safety check.</p>`;
}

function emptyView() {
    if (state.jobs.some((job) => job.kind === "draw" && !hasEnded(job))) {
        return html`<p class="gallery-empty quiet" tabindex="-1">The first picture comes here.</p>`;
    }
    return html`
        <div class="gallery-empty" tabindex="-1">
            <h2>Say what you would like to see, then press Draw.</h2>
            ${fieldOf("prompt")
                ? html`
                      <p class="quiet">Or begin with one of these:</p>
                      <div class="row">${EXAMPLES.map(exampleView)}</div>
                  `
                : nothing}
            <p class="hint">A picture that was drawn here brings its inputs back when it is dropped here, or pasted.</p>
        </div>
    `;
}

function exampleView(prompt) {
    const take = () => {
        state.inputs = { ...state.inputs, prompt };
        announce(`The prompt is “${prompt}”.`);
    };
    return html`<button class="chip" @click=${take}>${prompt}</button>`;
}

function takeDropped(carried) {
    // A picture that was dragged from this page itself is nothing new.
    if (carried.getData("text/uri-list").startsWith("blob:")) return;
    if (carried.files.length > 0) receive([...carried.files]);
}

/** Take the first picture of at least one file: the inputs in its metadata, or without these itself as image. */
export async function receive(files) {
    const file = files.find(isPicture);
    if (file === undefined) return note(`${files[0].name} is not a picture.`);
    const made = await readMetadata(file);
    if (made === null) return setImage(file);
    const { recipe, notes } = recipeOf(made, state.schema.fields);
    restore(recipe);
    notes.forEach(note);
    announce(`The form has the inputs of ${file.name}.`);
}

/**
 * The pictures: the selected one as large as there is room, two beside each other, and all of them in a strip.
 */

import { clear, forget, MOST } from "./history.js";
import { enqueue } from "./jobs.js";
import { sizeProblem } from "./loras.js";
import { readMetadata, recipeOf } from "./metadata.js";
import { restore } from "./recipe.js";
import { announce, changed, note, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

// Words that the miniature has learnt, too.
const EXAMPLES = ["a red fox in the snow", "a blue robot in the desert", "a purple mushroom in the forest"];
const NONE = ".gallery-empty"; // what is seen where there is no picture
const FORMATS = { "image/webp": "WebP", "image/jpeg": "JPEG", "image/png": "PNG" };

const urls = new Map(); // blob: addresses, by Blob
const sizes = new WeakMap(); // {width, height} in pixels, by Blob, once it was shown
const view = {
    copied: null, // the id of the picture whose seed was copied last
    picking: false, // the next picture that is chosen is compared with the selected one
    wiping: false, // the two are compared one over the other
    confirming: false, // clearing the history
};

/** The selected picture, or two to compare, or what to do where there is none. Takes pictures dropped on it. */
export function stageView() {
    const picture = selected();
    const other = state.pictures.find(({ id }) => id === state.compare);
    const shown = other === undefined ? pictureView : compareView;
    return html`
        <div
            class="gallery-stage"
            @dragover=${onDragOver}
            @dragleave=${onDragLeave}
            @drop=${onDrop}
            @keydown=${onEscape}
        >
            ${picture === undefined ? emptyView() : shown(picture, other)}
        </div>
    `;
}

/** All pictures, the newest first. */
export function stripView() {
    revokeOthers();
    if (state.pictures.length === 0) return nothing;
    return html`
        <section class="gallery-history" aria-label="History" @keydown=${onEscape}>
            <div class="row gallery-bar">
                <h2>History</h2>
                <span class="quiet">${state.pictures.length} of ${MOST}</span>
                ${view.confirming ? confirmView() : clearView()}
            </div>
            <div class="gallery-strip" role="group" aria-label="Pictures" @keydown=${onStripKey}>
                ${state.pictures.map(thumbView)}
            </div>
        </section>
    `;
}

/** Show one picture again, instead of two. */
export function closeCompare() {
    state.compare = null;
    view.picking = false;
    changedThenFocus(".gallery-compare");
}

/**
 * Take a picture from the clipboard, before the form does, unless it is pasted into the form. Text that comes with it
 * (a cell of a spreadsheet brings both) is what was meant.
 *
 * @param {ClipboardEvent} event of the document, as it is captured
 */
export function paste(event) {
    const { files, types } = event.clipboardData;
    const isPicture = [...files].some(({ type }) => type.startsWith("image/")) && !types.includes("text/plain");
    if (!isPicture || event.target.closest?.("form") || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    event.stopPropagation();
    receive([...files]);
}

function selected() {
    return state.pictures.find(({ id }) => id === state.selected) ?? state.pictures[0];
}

// One picture

function pictureView(picture) {
    const { blob, recipe } = picture;
    return html`
        <figure class="gallery-figure">
            <img
                class="gallery-picture"
                src=${urlOf(blob)}
                alt=${promptOf(picture)}
                .style=${sizeStyle(blob)}
                @load=${(event) => measured(blob, event.target)}
            />
            <figcaption>
                <p class="gallery-prompt">${promptOf(picture)}</p>
                <ul class="gallery-facts">
                    ${picture.seed === null ? nothing : html`<li>Seed ${picture.seed} ${copyView(picture)}</li>`}
                    ${factsOf(picture).map((fact) => html`<li>${fact}</li>`)}
                </ul>
                ${droppedView(picture)}
            </figcaption>
        </figure>
        <div class="row gallery-actions">
            <a class="button" href=${urlOf(blob)} download=${picture.name}>Download</a>
            <button class="button" type="button" @click=${() => drawAgain(recipe)}>Same again</button>
            <button class="button" type="button" @click=${() => useInputs(recipe)}>Use its inputs</button>
            <button class="button" type="button" @click=${() => useAsImage(fileOf(picture))}>Use as image</button>
            <button
                class="button"
                type="button"
                aria-pressed=${isSeedKept(picture)}
                ?disabled=${picture.seed === null}
                @click=${() => toggleSeed(picture)}
            >
                Keep seed
            </button>
            <button
                class="button gallery-compare"
                type="button"
                aria-pressed=${view.picking}
                ?disabled=${state.pictures.length < 2}
                @click=${togglePicking}
            >
                Compare
            </button>
            <button class="button quiet" type="button" @click=${() => remove(picture)}>Delete</button>
        </div>
        ${view.picking ? html`<p class="notice">Choose the picture to compare it with in the history.</p>` : nothing}
    `;
}

function copyView({ id, seed }) {
    const copy = () => copySeed(id, seed);
    return html`
        <button class="button quiet gallery-copy" type="button" aria-label="Copy seed" @click=${copy}>
            ${view.copied === id ? "Copied" : "Copy"}
        </button>
    `;
}

/** What is known of a picture, in a few words each. */
function factsOf(picture) {
    const { blob, loras, metrics } = picture;
    const size = sizes.get(blob);
    const seconds = metrics.predict_time?.toFixed(1);
    const steps = inputOf(picture, "num_inference_steps");
    const together = metrics.seeds?.length ?? 1;
    return [
        size && `${size.width} × ${size.height} px`,
        inputOf(picture, "model"),
        steps && `${steps} steps`,
        ...loras.map(({ name, path, scale }) => loraText({ path: name ?? path, scale })),
        seconds && (together > 1 ? `${seconds} s for ${together}` : `${seconds} s`),
        `${FORMATS[blob.type] ?? blob.type}, ${Math.ceil(blob.size / 1000)} kB`,
    ].filter(Boolean);
}

function droppedView({ metrics: { safety, seeds } }) {
    const count = safety?.dropped?.length ?? 0;
    if (count === 0) return nothing;
    const of = seeds?.length > count ? ` of ${seeds.length}` : "";
    const pictures = count === 1 ? `1 picture${of} was` : `${count} pictures${of} were`;
    return html`<p class="hint">${pictures} kept back by the safety check.</p>`;
}

/** The size in pixels, for the style sheet: a picture may be shown at twice its size, no larger. */
function sizeStyle(blob) {
    const size = sizes.get(blob);
    return size ? `--gallery-width: ${size.width}; --gallery-height: ${size.height}` : "";
}

function measured(blob, { naturalWidth: width, naturalHeight: height }) {
    if (sizes.has(blob)) return;
    sizes.set(blob, { width, height });
    changed();
}

async function copySeed(id, seed) {
    try {
        await navigator.clipboard.writeText(String(seed));
        view.copied = id;
        announce(`The seed ${seed} is copied.`);
    } catch {
        note(`This browser lets no page copy here: the seed is ${seed}.`);
    }
}

function drawAgain(recipe) {
    restore(recipe);
    enqueue(recipe);
}

function useInputs(recipe) {
    restore(recipe);
    announce("The form has the inputs of this picture.");
}

/** Draw from a picture. A mask was painted for another one. */
function useAsImage(image) {
    const problem = sizeProblem(image, state.inputs.image);
    if (problem !== null) return note(problem);
    if (state.schema && !fieldOf("image")) return note("This server has no input for an image to draw from.");
    const { mask, ...inputs } = state.inputs;
    state.inputs = { ...inputs, image };
    state.problems = {};
    note(`The picture is now the image to draw from${mask ? "; the mask of the old one is gone" : ""}.`);
}

function isSeedKept({ seed }) {
    return state.seedLocked && state.inputs.seed === seed;
}

function toggleSeed(picture) {
    const { seed, ...inputs } = state.inputs;
    const kept = isSeedKept(picture);
    state.inputs = kept ? inputs : { ...inputs, seed: picture.seed };
    state.seedLocked = !kept;
    announce(kept ? "Each picture gets a seed of its own." : `The next pictures get the seed ${picture.seed}.`);
}

/** Delete a picture; the one after it takes its place. */
function remove(picture) {
    const place = state.pictures.indexOf(picture);
    if (picture === selected()) state.selected = (state.pictures[place + 1] ?? state.pictures[place - 1])?.id ?? null;
    state.pictures = state.pictures.filter((other) => other !== picture);
    if ([picture.id, state.selected].includes(state.compare)) state.compare = null;
    forget(picture.id);
    announce("The picture is deleted.");
    if (state.pictures.length === 0) changedThenFocus(NONE);
}

// None

function emptyView() {
    if (state.jobs.some(({ kind, status }) => kind === "draw" && ["queued", "waiting", "drawing"].includes(status))) {
        return html`<p class="gallery-empty quiet" tabindex="-1">The first picture comes here.</p>`;
    }
    const fill = (prompt) => {
        state.inputs = { ...state.inputs, prompt };
        announce(`The prompt is “${prompt}”.`);
    };
    return html`
        <div class="gallery-empty" tabindex="-1">
            <h2>Say what you would like to see, then press Draw.</h2>
            ${fieldOf("prompt")
                ? html`
                      <p class="quiet">Or begin with one of these:</p>
                      <div class="row">
                          ${EXAMPLES.map(
                              (prompt) => html`
                                  <button class="chip" type="button" @click=${() => fill(prompt)}>${prompt}</button>
                              `,
                          )}
                      </div>
                  `
                : nothing}
            <p class="hint">A picture that was drawn here brings its inputs back when it is dropped here, or pasted.</p>
        </div>
    `;
}

// Two

function togglePicking() {
    const others = state.pictures.filter((picture) => picture !== selected());
    state.selected = selected().id;
    if (others.length === 1) state.compare = others[0].id;
    else view.picking = !view.picking;
    changed();
}

function compareView(first, second) {
    const mode = (title, wiping) => html`
        <label>
            <input
                type="radio"
                name="gallery-mode"
                .checked=${view.wiping === wiping}
                @change=${() => {
                    view.wiping = wiping;
                    changed();
                }}
            />
            ${title}
        </label>
    `;
    return html`
        <div class="row gallery-bar">
            <fieldset class="segmented">
                <legend class="visually-hidden">How they are compared</legend>
                ${mode("Side by side", false)} ${mode("Wipe", true)}
            </fieldset>
            <button class="button quiet" type="button" aria-label="Close comparison" @click=${closeCompare}>
                Close
            </button>
        </div>
        ${view.wiping ? wipeView(first, second) : pairView(first, second)} ${differencesView(first, second)}
    `;
}

function pairView(first, second) {
    return html`
        <div class="gallery-pair" .style=${sizeStyle(first.blob)}>
            ${[first, second].map(
                (picture, index) => html`
                    <figure>
                        ${frameView(picture)}
                        <figcaption class="hint">
                            ${"AB"[index]}${picture.seed === null ? nothing : `, seed ${picture.seed}`}
                        </figcaption>
                    </figure>
                `,
            )}
        </div>
    `;
}

function wipeView(first, second) {
    const slide = ({ target }) => {
        target.closest(".gallery-wipe").style.setProperty("--gallery-divider", `${target.value}%`);
    };
    return html`
        <div class="gallery-wipe" .style=${sizeStyle(first.blob)}>
            <div class="gallery-layers">${[first, second].map(frameView)}</div>
            <div class="gallery-slide">
                <span>A</span>
                <input
                    type="range"
                    min="0"
                    max="100"
                    step="0.5"
                    value="50"
                    aria-label="How much of A is shown, in percent"
                    @input=${slide}
                />
                <span>B</span>
            </div>
        </div>
    `;
}

/** A picture in a frame that has the first one's shape, so that both frames are equal; what it stands in says it. */
function frameView(picture) {
    return html`
        <img
            class="gallery-frame"
            src=${urlOf(picture.blob)}
            alt=${nameOf(picture)}
            @load=${(event) => measured(picture.blob, event.target)}
        />
    `;
}

function differencesView(first, second) {
    const rows = differences(first, second);
    if (rows.length === 0) return html`<p class="hint">Both were drawn from the same inputs.</p>`;
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
                ${rows.map(
                    ({ title, texts }) => html`
                        <tr>
                            <th scope="row">${title}</th>
                            ${texts.map((text) => html`<td>${text}</td>`)}
                        </tr>
                    `,
                )}
            </tbody>
        </table>
    `;
}

/** @returns {{title: string, texts: [string, string]}[]} the inputs in which two pictures differ. */
function differences(first, second) {
    const both = [first, second];
    const names = new Set(both.flatMap(({ recipe }) => Object.keys(recipe.inputs)));
    const loras = both.map(({ recipe }) => recipe.loras.map(loraText).join(", ") || "none");
    const rows = [...names].map((name) => ({
        title: fieldOf(name)?.title ?? name,
        texts: both.map((picture) => valueText(inputOf(picture, name))),
    }));
    return [...rows, { title: "LoRAs", texts: loras }].filter(({ texts: [one, other] }) => one !== other);
}

function valueText(value) {
    if (value === undefined || value === null) return "none";
    if (value instanceof Blob) return `${value.name ?? "a file"} (${value.size} bytes)`;
    return typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
}

function loraText({ path, scale = 1 }) {
    return `${path} × ${Math.round(scale * 100) / 100}`;
}

// The strip

function thumbView(picture) {
    const current = picture === selected();
    return html`
        <button
            class="gallery-thumb"
            type="button"
            title=${promptOf(picture)}
            tabindex=${current ? 0 : -1}
            aria-current=${current ? "true" : nothing}
            @click=${() => choose(picture)}
        >
            <img loading="lazy" src=${urlOf(picture.blob)} alt=${nameOf(picture)} />
        </button>
    `;
}

function choose(picture) {
    if (view.picking) state.compare = picture.id;
    else state.selected = picture.id;
    if (state.compare === state.selected) state.compare = null;
    view.picking = false;
    state.tab = "picture";
    changed();
}

/** Arrows, Home and End go along the strip, and show what they come to; Delete deletes. */
function onStripKey(event) {
    const thumbs = [...event.currentTarget.children];
    const place = thumbs.indexOf(event.target);
    const last = thumbs.length - 1;
    const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last }[event.key];
    if (event.key === "Delete") {
        event.preventDefault();
        if (event.repeat) return; // one picture, however long the key is held
        remove(state.pictures[place]);
        if (last > 0) changedThenFocus(`.gallery-thumb:nth-child(${Math.min(place, last - 1) + 1})`);
    } else if (next !== undefined) {
        event.preventDefault();
        const thumb = thumbs[Math.max(0, Math.min(next, last))];
        thumb.focus();
        if (!view.picking) thumb.click();
    }
}

/** Escape leaves what was begun here, before it means anything else to the page. */
function onEscape(event) {
    if (event.key !== "Escape" || !(view.picking || view.confirming)) return;
    event.stopPropagation();
    view.picking = view.confirming = false;
    changed();
}

function clearView() {
    const ask = () => {
        view.confirming = true;
        changedThenFocus(".gallery-keep");
    };
    return html`<button class="button quiet gallery-clear" type="button" @click=${ask}>Clear history</button>`;
}

function confirmView() {
    const decide = (isMeant) => {
        view.confirming = false;
        if (isMeant) {
            Object.assign(state, { pictures: [], selected: null, compare: null });
            clear();
            announce("The history is empty.");
        }
        changedThenFocus(isMeant ? NONE : ".gallery-clear");
    };
    const count = state.pictures.length;
    return html`
        <span class="row" role="group" aria-label="Clear history">
            <span>${count === 1 ? "Delete this picture?" : `Delete all ${count} pictures?`}</span>
            <button class="button" type="button" @click=${() => decide(true)}>Delete all</button>
            <button class="button quiet gallery-keep" type="button" @click=${() => decide(false)}>Keep them</button>
        </span>
    `;
}

// Pictures from elsewhere

function onDragOver(event) {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    event.currentTarget.classList.add("gallery-dropping");
}

function onDragLeave({ currentTarget, relatedTarget }) {
    if (!currentTarget.contains(relatedTarget)) currentTarget.classList.remove("gallery-dropping");
}

function onDrop(event) {
    event.preventDefault();
    event.currentTarget.classList.remove("gallery-dropping");
    const { dataTransfer } = event;
    // A picture of this page that was dragged a little is no file of anybody's.
    if (dataTransfer.getData("text/uri-list").startsWith("blob:")) return;
    if (dataTransfer.files.length > 0) receive([...dataTransfer.files]);
}

/** A picture that says what it was drawn from brings its inputs back; another one is the image to draw from. */
async function receive(files) {
    const file = files.find(({ type }) => type.startsWith("image/"));
    if (file === undefined) return note(`${files[0].name} is not a picture.`);
    const made = state.schema && (await readMetadata(file));
    if (!made) return useAsImage(file);
    const { recipe, notes } = recipeOf(made, state.schema.fields);
    restore(recipe);
    [`The form has the inputs of ${file.name}.`, ...notes].forEach(note);
}

// What is said of a picture

function promptOf({ recipe }) {
    return recipe.inputs.prompt ?? "";
}

function nameOf(picture) {
    return picture.seed === null ? promptOf(picture) : `${promptOf(picture)}, seed ${picture.seed}`;
}

function fieldOf(name) {
    return state.schema?.fields.find((field) => field.name === name);
}

/** What an input of a picture was: a recipe has only what differs from the defaults. */
function inputOf({ recipe }, name) {
    return recipe.inputs[name] ?? fieldOf(name)?.default;
}

function fileOf({ blob, name }) {
    return new File([blob], name, { type: blob.type });
}

// Addresses and focus

function urlOf(blob) {
    if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
    return urls.get(blob);
}

/** Let go of the bytes of pictures that are no longer there. */
function revokeOthers() {
    const blobs = new Set(state.pictures.map(({ blob }) => blob));
    for (const [blob, url] of urls) {
        if (blobs.has(blob)) continue;
        URL.revokeObjectURL(url);
        urls.delete(blob);
    }
}

/** Have the page rendered, and focus what is there then. */
function changedThenFocus(selector) {
    changed();
    queueMicrotask(() => document.querySelector(selector)?.focus());
}

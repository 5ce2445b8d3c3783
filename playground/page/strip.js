/** All pictures in a strip, from which one is chosen or deleted. */

import { focusOn, urlOf } from "./browser.js";
import { leavePicking } from "./compare.js";
import { clear, forget, MOST } from "./history.js";
import { forgetLoras } from "./loras.js";
import { nameOf, promptOf } from "./pictures.js";
import { announce, change, selectedPicture, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";
import { repeat } from "./vendor/repeat.js";

const NONE = ".gallery-empty"; // what the stage shows where there is no picture

let confirming = false; // whether a person is asked if all shall be deleted

export function stripView() {
    if (state.pictures.length === 0) return nothing;
    return html`
        <section class="gallery-history" aria-label="History" @keydown=${onEscape}>
            <div class="row gallery-bar">
                <h2>History</h2>
                <span class="quiet">${state.pictures.length} of ${MOST}</span>
                ${confirming ? confirmView() : clearButton}
            </div>
            <div class="gallery-strip" role="group" aria-label="Pictures" @keydown=${onStripKey}>
                ${repeat(state.pictures, ({ id }) => id, thumbView)}
            </div>
        </section>
    `;
}

/** Delete a picture, from the browser's storage and then here; if it was selected, the one after it is then. */
export async function removePicture(picture) {
    await forget(picture.id);
    const place = state.pictures.indexOf(picture);
    if (place === -1) return; // asked twice
    if (picture === selectedPicture()) state.selected = neighbour(place)?.id ?? null;
    takeAway([picture]);
    announce("The picture is deleted.");
    if (state.pictures.length === 0) focusOn(NONE);
}

/** The picture after the one at a place, or before the last one. */
const neighbour = (place) => state.pictures[place + 1] ?? state.pictures[place - 1];

/** Take pictures from the page, and end a comparison that lacks a picture then. */
function takeAway(gone) {
    state.pictures = state.pictures.filter((picture) => !gone.includes(picture));
    const others = state.pictures.filter((picture) => picture !== selectedPicture());
    if (!others.some(({ id }) => id === state.compare)) state.compare = null;
    if (others.length === 0) state.picking = false;
}

function thumbView(picture) {
    const isSelected = picture === selectedPicture();
    return html`
        <button
            class="gallery-thumb"
            data-id=${picture.id}
            title=${promptOf(picture)}
            tabindex=${isSelected ? 0 : -1}
            aria-current=${isSelected ? "true" : nothing}
            @click=${() => choose(picture)}
        >
            <img loading="lazy" src=${urlOf(picture.blob)} alt=${nameOf(picture)} />
        </button>
    `;
}

/** Show a picture, or compare it where that was asked for. */
function choose(picture) {
    if (state.picking) state.compare = picture.id;
    else state.selected = picture.id;
    if (state.compare === state.selected) state.compare = null;
    change(state, { picking: false, tab: "picture" });
}

/** Arrows, Home and End go along the strip, and show what they come to; Delete deletes. */
function onStripKey(event) {
    const place = state.pictures.findIndex(({ id }) => id === event.target.dataset.id);
    const last = state.pictures.length - 1;
    const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last }[event.key];
    if (event.key === "Delete") {
        event.preventDefault();
        if (!event.repeat) removeFocused(place); // one picture, however long the key is held
    } else if (next !== undefined) {
        event.preventDefault();
        const picture = state.pictures[Math.max(0, Math.min(next, last))];
        if (!state.picking) choose(picture);
        focusThumb(picture);
    }
}

async function removeFocused(place) {
    const next = neighbour(place);
    await removePicture(state.pictures[place]);
    if (next) focusThumb(next);
}

const focusThumb = ({ id }) => focusOn(`.gallery-thumb[data-id="${CSS.escape(id)}"]`);

const clearButton = html`
    <button class="button quiet gallery-clear" @click=${() => askToClear(true)}>Clear history</button>
`;

function confirmView() {
    const count = state.pictures.length;
    const pictures = count === 1 ? "Delete this picture" : `Delete all ${count} pictures`;
    return html`
        <span class="row" role="group" aria-label="Clear history">
            <span>${pictures}, and forget which LoRAs were used?</span>
            <button class="button" @click=${removeAll}>Delete all</button>
            <button class="button quiet gallery-keep" @click=${() => askToClear(false)}>Keep them</button>
        </span>
    `;
}

function askToClear(isAsked) {
    confirming = isAsked;
    focusOn(isAsked ? ".gallery-keep" : ".gallery-clear");
}

/** Escape ends the question or the choice of a picture, and then goes no further. */
function onEscape(event) {
    if (event.key !== "Escape" || !confirming) return leavePicking(event);
    event.stopPropagation();
    askToClear(false);
}

/** Delete the pictures that are here now, and all known LoRAs; pictures that are drawn meanwhile stay. */
async function removeAll() {
    const asked = [...state.pictures];
    confirming = false;
    forgetLoras();
    await clear();
    takeAway(asked);
    announce("The history is empty.");
    focusOn(state.pictures.length > 0 ? ".gallery-clear" : NONE);
}

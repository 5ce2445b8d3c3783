/**
 * What is said of a picture, and the picture itself with its size.
 */

import { urlOf } from "./browser.js";
import { fieldNamed, own } from "./schema.js";
import { changed, state } from "./store.js";
import { html } from "./vendor/lit-html.js";

const sizes = new WeakMap(); // {width, height} in pixels, by Blob, once it was shown

/** @returns {Field|undefined} an input of the server, by its name */
export function fieldOf(name) {
    return fieldNamed(state.schema?.fields ?? [], name);
}

/** What an input of a picture was: a recipe has only what differs from the defaults. */
export function inputOf({ recipe }, name) {
    return own(recipe.inputs, name) ?? fieldOf(name)?.default;
}

/** What a picture shows, as far as anybody has said it. */
export function promptOf(picture) {
    return String(inputOf(picture, "prompt") ?? "");
}

/** The prompt and the seed. */
export function nameOf(picture) {
    return picture.seed === null ? promptOf(picture) : `${promptOf(picture)}, seed ${picture.seed}`;
}

/** A LoRA with its strength, "zorp × 0.8". */
export function loraText({ path, scale = 1 }) {
    return `${path} × ${Math.round(scale * 100) / 100}`;
}

/** @returns {{width: number, height: number}|undefined} in pixels; undefined before it was shown */
export function sizeOf({ blob }) {
    return sizes.get(blob);
}

/** The size for the style sheet, as a declaration of its variables; empty before the picture was shown. */
export function sizeStyle(picture) {
    const size = sizeOf(picture);
    return size ? `--gallery-width: ${size.width}; --gallery-height: ${size.height}` : "";
}

/**
 * The picture as it is, the size of which is known from then on.
 *
 * @param {Picture} picture
 * @param {string} className
 * @param {string} alt what stands in for it
 */
export function imageView(picture, className, alt) {
    const learn = ({ target: { naturalWidth: width, naturalHeight: height } }) => {
        if (sizes.has(picture.blob)) return;
        sizes.set(picture.blob, { width, height });
        changed();
    };
    return html`<img class=${className} src=${urlOf(picture.blob)} alt=${alt} @load=${learn} />`;
}

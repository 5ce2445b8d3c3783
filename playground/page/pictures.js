/** Texts about a picture, and the picture itself with its size. */

import { urlOf } from "./browser.js";
import { fieldNamed, own } from "./schema.js";
import { changed, state } from "./store.js";
import { html } from "./vendor/lit-html.js";

const sizes = new WeakMap(); // {width, height} in pixels, by Blob, once it was shown

/** @returns {Field|undefined} an input of the server, by its name */
export const fieldOf = (name) => fieldNamed(state.schema?.fields ?? [], name);

/** The value of an input of a picture; a recipe holds only those that differ from the defaults. */
export const inputOf = ({ recipe }, name) => own(recipe.inputs, name) ?? fieldOf(name)?.default;

/** The prompt of a picture; "" where it has none. */
export const promptOf = (picture) => String(inputOf(picture, "prompt") ?? "");

export function nameOf(picture) {
    return picture.seed === null ? promptOf(picture) : `${promptOf(picture)}, seed ${picture.seed}`;
}

/** A LoRA with its strength, "zorp × 0.8". */
export const loraText = ({ path, scale = 1 }) => `${path} × ${Math.round(scale * 100) / 100}`;

/** @returns {{width: number, height: number}|undefined} in pixels; undefined before it was shown */
export const sizeOf = ({ blob }) => sizes.get(blob);

/** The size for the style sheet, as a declaration of its variables; empty before the picture was shown. */
export function sizeStyle(picture) {
    const size = sizeOf(picture);
    return size ? `--gallery-width: ${size.width}; --gallery-height: ${size.height}` : "";
}

/** The picture as an element; once it has loaded, `sizeOf` knows its size. */
export function imageView(picture, className, alt) {
    const learn = ({ target: { naturalWidth: width, naturalHeight: height } }) => {
        if (sizes.has(picture.blob)) return;
        sizes.set(picture.blob, { width, height });
        changed();
    };
    return html`<img class=${className} src=${urlOf(picture.blob)} alt=${alt} @load=${learn} />`;
}

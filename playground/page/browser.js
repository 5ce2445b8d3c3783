/**
 * What views need of the browser: addresses of bytes, files to save, the clipboard, tabs, drops, and words for sizes.
 */

import { changed } from "./store.js";
import { html } from "./vendor/lit-html.js";

/** The key that gives commands, as people read it. */
export const COMMAND = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

const urls = new WeakMap(); // by Blob
const unused = new FinalizationRegistry((url) => URL.revokeObjectURL(url));

/**
 * The address of bytes within the page, which is theirs as long as anybody holds them.
 *
 * @param {Blob} blob
 * @returns {string}
 */
export function urlOf(blob) {
    if (!urls.has(blob)) {
        const url = URL.createObjectURL(blob);
        urls.set(blob, url);
        unused.register(blob, url);
    }
    return urls.get(blob);
}

/**
 * Save bytes as a file.
 *
 * @param {Blob} blob
 * @param {string} name of the file
 */
export function download(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // until the browser has read it
}

/**
 * Copy a text.
 *
 * @param {string} text
 * @returns {Promise<boolean>} whether the browser lets the page do so
 */
export async function copyText(text) {
    try {
        await navigator.clipboard.writeText(text);
        return true;
    } catch {
        return copySelected(text);
    }
}

/** A page that came over plain HTTP from another machine has no clipboard: what is selected can be copied. */
function copySelected(text) {
    const focused = document.activeElement;
    const area = document.createElement("textarea");
    Object.assign(area, { value: text, readOnly: true, className: "visually-hidden" });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused.focus();
    return copied;
}

/**
 * Have the page rendered anew, and then do what needs what is there by then, such as setting the focus.
 *
 * @param {function(): void} work
 */
export function afterRender(work) {
    changed();
    queueMicrotask(work);
}

/** Have the page rendered anew, and give the focus to the first element of a selector, if there is one then. */
export function focusOn(selector) {
    afterRender(() => document.querySelector(selector)?.focus());
}

/**
 * A list of tabs, with the keys that such lists have. The panel beneath is the caller's: its id is `<id>-panel`, and
 * `<id>-tab-<chosen>` is what labels it.
 *
 * @param {{label: string, id: string, tabs: Object<string, string>, chosen: string, choose: function(string): void}} of
 *     tabs: the title of each, by its name; `choose` gets a name
 */
export function tabsView({ label, id, tabs, chosen, choose }) {
    const names = Object.keys(tabs);
    const move = (event) => {
        const [place, last] = [names.indexOf(chosen), names.length - 1];
        const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last }[event.key];
        if (next === undefined) return;
        event.preventDefault();
        const name = names.at(next % names.length);
        choose(name);
        afterRender(() => document.getElementById(`${id}-tab-${name}`).focus());
    };
    const tabView = (name) => html`
        <button
            role="tab"
            type="button"
            id="${id}-tab-${name}"
            aria-controls="${id}-panel"
            aria-selected=${name === chosen}
            tabindex=${name === chosen ? 0 : -1}
            @click=${() => choose(name)}
        >
            ${tabs[name]}
        </button>
    `;
    return html`<div class="tabs" role="tablist" aria-label=${label} @keydown=${move}>${names.map(tabView)}</div>`;
}

/**
 * The handlers of an element on which something can be dropped.
 *
 * @param {string} className that the element has while something is over it
 * @param {function(DataTransfer): void} take what was dropped
 */
export function dropTarget(className, take) {
    const dragover = (event) => {
        event.preventDefault(); // else nothing can be dropped
        event.currentTarget.classList.add(className);
    };
    const dragleave = ({ currentTarget, relatedTarget }) => {
        if (!currentTarget.contains(relatedTarget)) currentTarget.classList.remove(className); // else it is within
    };
    const drop = (event) => {
        event.preventDefault();
        event.currentTarget.classList.remove(className);
        take(event.dataTransfer);
    };
    return { dragover, dragleave, drop };
}

/** Whether a file is a picture, by its type. */
export function isPicture({ type }) {
    return type.startsWith("image/");
}

/** A number of bytes as people read it: "26 kB", "1.2 MB". */
export function sizeText(bytes) {
    return bytes < 100_000 ? `${Math.ceil(bytes / 1000)} kB` : `${Number((bytes / 1e6).toFixed(1))} MB`;
}

/**
 * What several views need of the browser: addresses of bytes, files to save, the clipboard, the focus, and small parts.
 */

import { changed } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

/** The key that gives commands, as people read it. */
export const COMMAND = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

const urls = new WeakMap(); // by Blob
const unused = new FinalizationRegistry((url) => URL.revokeObjectURL(url));

/** The address of a Blob within the page; it is revoked once nothing holds the Blob. */
export function urlOf(blob) {
    if (!urls.has(blob)) {
        const url = URL.createObjectURL(blob);
        urls.set(blob, url);
        unused.register(blob, url);
    }
    return urls.get(blob);
}

export function download(blob, name) {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // until the browser has read it
}

/** @returns {Promise<boolean>} whether the browser lets the page copy this text. */
export async function copyText(text) {
    try {
        await navigator.clipboard.writeText(text);
        return true;
    } catch {
        // A page that came over plain HTTP from another machine has no clipboard, but can copy what is selected.
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
}

/** Have the page rendered anew, then call `work`, which may need new elements. */
export function afterRender(work) {
    changed();
    queueMicrotask(work);
}

/** Have the page rendered anew, then focus the first element of a selector, if there is one. */
export const focusOn = (selector) => afterRender(() => document.querySelector(selector)?.focus());

/**
 * A list of tabs, with the keys that such lists have. The caller adds the panel: its id is `<id>-panel`, and
 * `<id>-tab-<chosen>` labels it.
 *
 * `tabs` has a `{title}` by the name of each; `chosen` is a name, and `choose` gets one.
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
        focusOn(`#${id}-tab-${name}`);
    };
    const tabView = (name) => html`
        <button
            role="tab"
            id="${id}-tab-${name}"
            aria-controls="${id}-panel"
            aria-selected=${name === chosen}
            tabindex=${name === chosen ? 0 : -1}
            @click=${() => choose(name)}
        >
            ${tabs[name].title}
        </button>
    `;
    return html`<div class="tabs" role="tablist" aria-label=${label} @keydown=${move}>${names.map(tabView)}</div>`;
}

/**
 * A button whose `label` says more than its content. `pressed` makes it a toggle; `isOpen` tells whether the element
 * with the id `opens`, which it opens, is there.
 */
export function labelledButton(content, label, act, options = {}) {
    const { kind = "icon-button", title = nothing, pressed = nothing, opens = nothing, isOpen = nothing } = options;
    return html`
        <button
            class=${kind}
            type="button"
            aria-label=${label}
            title=${title}
            aria-pressed=${pressed}
            aria-expanded=${isOpen}
            aria-controls=${isOpen === true ? opens : nothing}
            @click=${act}
        >
            ${content}
        </button>
    `;
}

/** A radio button with its label, of the group `name`. */
export function radioView(name, label, isChosen, take) {
    return html`<label><input type="radio" name=${name} .checked=${isChosen} @change=${take} />${label}</label>`;
}

/** A slider from `minimum` to `maximum`; `set` gets the number that it is moved to. */
export function slider({ minimum, maximum, step }, { value, set, kind = nothing, ...texts }) {
    const { label = nothing, labelledBy = nothing, valueText = nothing } = texts;
    return html`
        <input
            class=${kind}
            type="range"
            min=${minimum}
            max=${maximum}
            step=${step}
            aria-label=${label}
            aria-labelledby=${labelledBy}
            aria-valuetext=${valueText}
            .value=${String(value)}
            @input=${({ target }) => set(target.valueAsNumber)}
        />
    `;
}

/** A button that chooses files; `take` gets them in a list. */
export function fileButton(text, { id, label, accept, multiple = false, take }) {
    const choose = ({ target }) => {
        take([...target.files]);
        target.value = ""; // so that the same file can be chosen again
    };
    return html`
        <span class="form-upload">
            <input
                class="visually-hidden"
                type="file"
                id=${id}
                ?multiple=${multiple}
                accept=${accept}
                aria-label=${label}
                @change=${choose}
            />
            <label class="button" for=${id}>${text}</label>
        </span>
    `;
}

/** Handlers for an element that takes drops: `take` gets the DataTransfer; meanwhile the element has the class. */
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

export const isPicture = ({ type }) => type.startsWith("image/");

/** A number of bytes as people read it: "26 kB", "1.2 MB". */
export function sizeText(bytes) {
    return bytes < 100_000 ? `${Math.ceil(bytes / 1000)} kB` : `${Number((bytes / 1e6).toFixed(1))} MB`;
}

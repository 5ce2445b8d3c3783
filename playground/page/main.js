/**
 * The page: its layout, its keys, and what is done with a shared address.
 */

import { codeView, jsonView } from "./code.js";
import { watch } from "./connection.js";
import { checkForm, formView, reset } from "./form.js";
import { closeCompare, paste, stageView, stripView } from "./gallery.js";
import { gridView } from "./grid.js";
import { load } from "./history.js";
import { cancelJob, current, enqueue } from "./jobs.js";
import { restore, snapshot } from "./recipe.js";
import { fromFragment, toFragment, unshared } from "./share.js";
import { connectionView, logView, progressView, statePanel } from "./status.js";
import { changed, note, onChange, state } from "./store.js";
import { html, nothing, render } from "./vendor/lit-html.js";

const TABS = {
    picture: { title: "Picture", view: stageView },
    grid: { title: "Grid", view: gridView },
    log: { title: "Log", view: logView },
    json: { title: "JSON", view: jsonView },
    code: { title: "Code", view: codeView },
};
const LONGEST_FRAGMENT = 60_000; // characters: of longer addresses browsers and programs lose the end
const TYPED = "textarea, input:is([type=text], [type=number], [type=url], [type=password])";
const COMMAND = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

function pageView() {
    return html`
        <header class="page-header">
            <h1>flux-sprites<small>playground</small></h1>
            ${connectionView()}
            <button class="button quiet" type="button" @click=${share}>Share</button>
            ${state.about?.server === "front" ? html`<a class="button quiet" href="../docs">API</a>` : nothing}
        </header>
        <main class="page-main">
            <div class="page-form">
                <div class="page-fields">${state.schema ? formView() : nothing}</div>
                ${state.schema ? drawBar() : nothing}
            </div>
            <div class="page-stage">
                ${statePanel()} ${state.notes.map(noteView)} ${state.schema ? tabsView() : nothing} ${stripView()}
            </div>
        </main>
        <div class="visually-hidden" aria-live="polite">${state.said}</div>
    `;
}

function drawBar() {
    return html`
        <div class="page-draw">
            <button class="button primary" type="submit" form="form">Draw <kbd aria-hidden="true">${COMMAND} ↵</kbd></button>
            <button class="button quiet" type="button" @click=${reset}>Reset all</button>
        </div>
    `;
}

function tabsView() {
    const { view } = TABS[state.tab];
    return html`
        <div class="page-bar">
            <div class="tabs" role="tablist" aria-label="What is shown" @keydown=${moveTab}>
                ${Object.entries(TABS).map(tabView)}
            </div>
            ${progressView()}
        </div>
        <div role="tabpanel" id="panel" aria-labelledby="tab-${state.tab}">${view()}</div>
    `;
}

function tabView([name, { title }]) {
    return html`
        <button
            role="tab"
            type="button"
            id="tab-${name}"
            aria-controls="panel"
            aria-selected=${state.tab === name}
            tabindex=${state.tab === name ? 0 : -1}
            @click=${() => show(name)}
        >
            ${title}
        </button>
    `;
}

function noteView(sentence) {
    const dismiss = () => {
        state.notes = state.notes.filter((other) => other !== sentence);
        changed();
    };
    return html`
        <div class="notice">
            <p>${sentence}</p>
            <button class="icon-button" type="button" aria-label="Dismiss" @click=${dismiss}>✕</button>
        </div>
    `;
}

function show(tab) {
    state.tab = tab;
    changed();
}

/** The arrow keys of a list of tabs. */
function moveTab(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const names = Object.keys(TABS);
    show(names[(names.indexOf(state.tab) + step + names.length) % names.length]);
    queueMicrotask(() => document.getElementById(`tab-${state.tab}`).focus());
}

/** Draw what the form says; on a narrow screen, go to where it will be seen. */
function draw() {
    if (state.schema === null || !checkForm()) return;
    if (state.tab !== "log") state.tab = "picture";
    enqueue(snapshot());
    if (!matchMedia("(min-width: 60rem)").matches) document.querySelector(".page-stage").scrollIntoView();
}

async function share() {
    const recipe = snapshot();
    const fragment = toFragment(recipe);
    if (fragment.length > LONGEST_FRAGMENT) return note("These inputs are too long for an address.");
    history.replaceState(null, "", fragment); // the form keeps its files, as no hashchange is told
    const left = unshared(recipe);
    const without = left.length > 0 ? `; not in it: ${left.join(", ")}.` : ".";
    try {
        await navigator.clipboard.writeText(location.href);
        note(`The address of these inputs is copied${without}`);
    } catch {
        note(`The address in the browser's bar has these inputs${without}`);
    }
}

let shared = location.hash; // of the address, until the schema tells what it means

function takeShared() {
    const recipe = shared && state.schema ? fromFragment(shared, state.schema.fields) : null;
    if (state.schema) shared = "";
    if (recipe) restore(recipe);
}

function onKey(event) {
    if (event.isComposing) return; // it is meant for the input method
    if (event.key === "Enter") {
        const command = event.ctrlKey || event.metaKey;
        // Held down, it draws a single time.
        if (command || (event.repeat && !event.target.closest("textarea"))) event.preventDefault();
        if (command && !event.repeat) draw();
    } else if (event.key === "Escape" && !event.repeat && !document.querySelector("dialog[open]")) {
        if (state.compare !== null) closeCompare();
        else if (current()) cancelJob(current());
    }
}

onChange(() => {
    takeShared();
    render(pageView(), document.getElementById("page"));
});
document.addEventListener("keydown", onKey);
document.addEventListener("paste", paste, true); // before the form, which takes files that are pasted anywhere else
document.addEventListener("submit", (event) => {
    event.preventDefault();
    if (event.target.id === "form") draw();
});
window.addEventListener("hashchange", () => {
    shared = location.hash;
    changed();
});
// A file that misses its place must not replace the page; text may be dropped where it can be typed.
for (const kind of ["dragover", "drop"]) {
    window.addEventListener(kind, (event) => {
        const isText = !event.dataTransfer.types.includes("Files") && event.target.closest?.(TYPED);
        if (!isText) event.preventDefault();
    });
}
document.getElementById("page").replaceChildren();
changed();
load().then((pictures) => {
    state.pictures = [...state.pictures, ...pictures];
    changed();
});
watch();

/** The page: its layout, its keys, and shared addresses. */

import { COMMAND, copyText, isPicture, tabsView } from "./browser.js";
import { codeView, jsonView } from "./code.js";
import { closeCompare } from "./compare.js";
import { watch } from "./connection.js";
import { draw } from "./draw.js";
import { restore, snapshot } from "./field.js";
import { takePasted } from "./file_field.js";
import { checkForm, formView, reset } from "./form.js";
import { receive, stageView } from "./gallery.js";
import { gridView } from "./grid.js";
import { load } from "./history.js";
import { cancelAll, cancelJobs, current } from "./jobs.js";
import { fromFragment, toFragment, unshared } from "./share.js";
import { connectionView, logView, progressView, statePanel } from "./status.js";
import { change, changed, comparedPicture, note, onChange, state } from "./store.js";
import { stripView } from "./strip.js";
import { html, nothing, render } from "./vendor/lit-html.js";
import { repeat } from "./vendor/repeat.js";

const TABS = {
    picture: { title: "Picture", view: stageView },
    grid: { title: "Grid", view: gridView },
    log: { title: "Log", view: logView },
    json: { title: "JSON", view: jsonView },
    code: { title: "Code", view: codeView },
};
const LONGEST_FRAGMENT = 60_000; // characters: of longer addresses browsers and programs lose the end
const TYPED = "textarea, input:is([type=text], [type=url], [type=password])";

function pageView() {
    return html`
        <header class="page-header">
            <h1>flux-sprites<small>playground</small></h1>
            ${connectionView()}
            ${state.schema ? html`<button class="button quiet" @click=${share}>Share</button>` : nothing}
            ${state.about?.server === "front" ? apiLink : nothing}
        </header>
        <main class="page-main">
            ${noticesView()} ${state.schema ? formSide() : nothing}
            <div class="page-stage">${state.schema ? tabs() : nothing} ${stripView()}</div>
        </main>
        <div class="visually-hidden" aria-live="polite">${state.said}</div>
    `;
}

const apiLink = html`<a class="button quiet" href="../docs" target="_blank">API</a>`;

/** The state of a server that cannot draw, and the notes, if there are any. */
function noticesView() {
    const panel = statePanel();
    if (panel === nothing && state.notes.length === 0) return nothing;
    return html`<div class="page-notices">${panel} ${repeat(state.notes, (sentence) => sentence, noteView)}</div>`;
}

function formSide() {
    return html`
        <div class="page-form">
            <div class="page-fields">${formView()}</div>
            <div class="page-draw">
                <button class="button primary" type="submit" form="form">
                    Draw <kbd aria-hidden="true">${COMMAND} ↵</kbd>
                </button>
                <button class="button quiet" @click=${reset}>Reset all</button>
            </div>
        </div>
    `;
}

function tabs() {
    const choose = (tab) => change(state, { tab });
    return html`
        <div class="page-bar">
            ${tabsView({ label: "What is shown", id: "page", tabs: TABS, chosen: state.tab, choose })}
            ${progressView()}
        </div>
        <div role="tabpanel" id="page-panel" aria-labelledby="page-tab-${state.tab}">${TABS[state.tab].view()}</div>
    `;
}

function noteView(sentence) {
    const dismiss = () => change(state, { notes: state.notes.filter((other) => other !== sentence) });
    return html`
        <div class="notice">
            <p>${sentence}</p>
            <button class="icon-button" aria-label="Dismiss" @click=${dismiss}>✕</button>
        </div>
    `;
}

/** Draw what the form says; on a narrow screen, scroll to where the picture will be. */
function drawForm() {
    if (state.schema === null || !checkForm()) return;
    if (state.tab !== "log") state.tab = "picture";
    draw(snapshot());
    if (!matchMedia("(min-width: 60rem)").matches) document.querySelector(".page-stage").scrollIntoView();
}

async function share() {
    const recipe = snapshot();
    const { fields } = state.schema;
    const fragment = toFragment(recipe, fields);
    if (fragment.length > LONGEST_FRAGMENT) return note("These inputs are too long for an address.");
    history.replaceState(null, "", fragment); // fires no hashchange, so the form keeps its files
    const left = unshared(recipe, fields);
    const without = left.length > 0 ? `; not in it: ${left.join(", ")}.` : ".";
    const where = (await copyText(location.href)) ? "is copied" : "is in the browser's bar";
    note(`The address of these inputs ${where}${without}`);
}

let shared = location.hash; // of the address, until the schema is there to read it

function takeShared() {
    if (!shared || !state.schema) return;
    const recipe = fromFragment(shared, state.schema.fields);
    shared = "";
    if (recipe) restore(recipe);
}

function onKey(event) {
    if (event.isComposing) return; // it is meant for the input method
    if (event.key === "Enter") {
        const command = event.ctrlKey || event.metaKey;
        // Held down, it draws a single time.
        if (command || (event.repeat && !event.target.closest("textarea"))) event.preventDefault();
        if (command && !event.repeat) drawForm();
    } else if (event.key === "Escape" && !event.repeat && !document.querySelector("dialog[open]")) {
        if (comparedPicture()) closeCompare();
        else if (current()) cancelJobs([current()]);
    }
}

/** Files that are pasted go to the form, but a picture that is pasted elsewhere goes to the stage. */
function onPaste(event) {
    const { files, types } = event.clipboardData;
    const within = (selector) => event.target.closest?.(selector);
    // A cell of a spreadsheet brings a picture of itself along with its text.
    const isText = types.includes("text/plain") && within(TYPED);
    if (files.length === 0 || isText || !state.schema || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    if ([...files].some(isPicture) && !within("#form")) receive([...files]);
    else takePasted(files[0], within("[data-name]")?.dataset.name);
}

onChange(() => {
    takeShared();
    render(pageView(), document.getElementById("page"));
});
document.addEventListener("keydown", onKey);
document.addEventListener("paste", onPaste);
document.addEventListener("submit", (event) => {
    event.preventDefault();
    if (event.target.id === "form") drawForm();
});
window.addEventListener("hashchange", () => {
    shared = location.hash;
    changed();
});
// A closed page needs its drawings no more; one that the browser keeps for the way back (persisted) does.
window.addEventListener("pagehide", ({ persisted }) => {
    if (!persisted) cancelAll();
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
load().then((pictures) => change(state, { pictures: [...state.pictures, ...pictures] }));
watch();

/** The form's request, as JSON and as programs that send it. */

import { copyText, download, tabsView, urlOf } from "./browser.js";
import { snapshot } from "./field.js";
import { own, problemsOf, withoutSecrets } from "./schema.js";
import { snippets } from "./snippets.js";
import { announce, change, changed, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";
import { encode, shortened } from "./wire.js";

const LANGUAGES = {
    curl: { title: "cURL", hint: "For bash, with curl, grep and base64." },
    python: { title: "Python", hint: "Save it as draw.py: Python 3.11 needs nothing else." },
    javascript: { title: "JavaScript", hint: "Save it as draw.mjs: Node 20 needs nothing else." },
    predict: { title: "script/predict", hint: "In this repository, with a server of its own that it starts for this." },
};

const view = { language: "curl" }; // the tab of `codeView`
let copied = null; // the text that was copied last
let request = null; // what `requestText` has encoded: {asked, fields, text}
let encoding = false;

/** The tab with the request as it would be sent now, and the last answer. */
export function jsonView() {
    const answer = state.jobs.findLast((job) => job.answer)?.answer;
    const secrets = state.schema.fields.some(({ secret }) => secret);
    return html`
        <div class="stack">
            <p class="hint">Files are cut here, and sent whole${secrets ? "; secrets are sent, and not shown" : ""}.</p>
            ${wrongView() ?? blockView("Request", requestText())}
            ${answer
                ? blockView("Last answer", JSON.stringify(shortened(answer), null, 2))
                : html`<p class="quiet">There is no answer yet.</p>`}
        </div>
    `;
}

/** The tab with programs that send the request of the form. */
export function codeView() {
    const address = state.about?.address ?? new URL("..", location).href;
    const made = snippets(snapshot(), { ...state.about, address }, state.schema);
    const { language } = view;
    const choose = (name) => change(view, { language: name });
    return html`
        <div class="stack">
            ${tabsView({ label: "Language", id: "code", tabs: LANGUAGES, chosen: language, choose })}
            <div class="stack" role="tabpanel" id="code-panel" aria-labelledby="code-tab-${language}">
                ${wrongView() ?? (made[language] === null ? html`<p>${made.reason}</p>` : programView(made))}
            </div>
        </div>
    `;
}

/** Problems of the form, shown in place of a request; null where there are none. Missing inputs are no problem here. */
function wrongView() {
    const { inputs } = state;
    const problems = Object.entries(problemsOf(inputs, state.schema.fields));
    const wrong = problems.filter(([name]) => own(inputs, name) !== undefined);
    return wrong.length > 0 ? wrong.map(([, sentence]) => html`<p class="problem">${sentence}</p>`) : null;
}

/** A program, and the files that it reads, some of which were made on this page. */
function programView({ files, variables, ...made }) {
    const fileView = ([file, name]) =>
        html`<button class="chip" @click=${() => download(file, name)}>Download ${name}</button>`;
    const filesView = html`
        <div class="row code-files">
            <span>${files.length === 1 ? "This file" : "These files"} must lie beside it:</span>
            ${files.map(fileView)}
        </div>
    `;
    const whatOf = (name) => (name === "FLUX_TOKEN" ? "your token" : name.toLowerCase());
    const reads = variables.map((name) => html`It reads ${whatOf(name)} from the variable <code>${name}</code>. `);
    const { title, hint } = LANGUAGES[view.language];
    const program = blockView(title, made[view.language], html`${hint} ${reads}`);
    return html`${files.length > 0 ? filesView : nothing} ${program}`;
}

/** The request as JSON; encoding takes a moment, after which the page is rendered anew. */
function requestText() {
    const [recipe, { fields }] = [snapshot(), state.schema];
    const asked = JSON.stringify(recipe, (_, value) => (value instanceof Blob ? urlOf(value) : value));
    if (!encoding && (request?.fields !== fields || request.asked !== asked)) {
        encoding = true;
        encode({ ...recipe, inputs: withoutSecrets(recipe.inputs, fields) }, fields)
            .then((input) => JSON.stringify({ input: shortened(input) }, null, 2))
            .catch((error) => error.message)
            .then((text) => {
                request = { asked, fields, text };
                encoding = false;
                changed();
            });
    }
    return request?.text ?? "";
}

/** A text with a button that copies it, under a heading. */
function blockView(title, text, heading = html`<h2>${title}</h2>`) {
    return html`
        <section class="code-block" aria-label=${title}>
            <div class="code-head">
                <div>${heading}</div>
                <button class="button quiet" aria-label="Copy ${title}" @click=${copy}>
                    ${text && copied === text ? "Copied" : "Copy"}
                </button>
            </div>
            <pre tabindex="0">${text}</pre>
        </section>
    `;
}

/** Copy the text of the block whose button was pressed. */
async function copy(event) {
    const block = event.currentTarget.closest(".code-block").querySelector("pre");
    if (await copyText(block.textContent)) {
        copied = block.textContent;
        announce("Copied.");
    } else {
        getSelection().selectAllChildren(block);
        announce("It is selected; copy it with the keyboard.");
    }
}

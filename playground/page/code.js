/**
 * What the form asks for, as JSON and as programs that ask for it, each of which runs as it stands.
 */

import { encode, sent, shortened, snapshot } from "./recipe.js";
import { announce, changed, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

const LANGUAGES = {
    curl: { title: "cURL", hint: "For bash, with curl, grep, cut and base64." },
    python: { title: "Python", hint: "Save it as draw.py: Python 3.11 needs nothing else." },
    javascript: { title: "JavaScript", hint: "Save it as draw.mjs: Node 20 needs nothing else." },
    predict: { title: "script/predict", hint: "In this repository, with a server of its own that it starts for this." },
};
// References that mean the same within a sum of LoRAs as by themselves, and factors that one may have.
const PLAIN = /^[\w./:-]+$/;
const DECIMAL = /^-?\d{1,20}(\.\d{1,20})?$/;
const BARE = /^[\w@%+=:,./-]+$/; // words that mean themselves in a shell
const LARGEST_ARGUMENT = 2 ** 17 - 1; // bytes, on Linux

let language = "curl"; // the tab of `codeView`
let copied = null; // the text that was copied last
let request = null; // what `requestText` has encoded: {recipe, fields, text}
let encoding = false;

/** The tab with the request as it would be sent now, and the last answer. */
export function jsonView() {
    const answer = state.jobs.findLast((job) => job.answer)?.answer;
    return html`
        <div class="stack">
            <p class="hint">Files are cut here, and sent whole.</p>
            ${blockView("Request", requestText())}
            ${answer
                ? blockView("Last answer", JSON.stringify(shortened(answer), null, 2))
                : html`<p class="quiet">There is no answer yet.</p>`}
        </div>
    `;
}

/** The tab with programs that ask for what the form says. */
export function codeView() {
    const recipe = snapshot();
    const here = new URL("..", location).href;
    const about = { ...state.about, address: state.about?.address ?? here };
    const made = snippets(recipe, about, state.schema.fields);
    const { title, hint } = LANGUAGES[language];
    return html`
        <div class="stack">
            <div class="tabs" role="tablist" aria-label="Language" @keydown=${moveTab}>
                ${Object.keys(LANGUAGES).map(languageTab)}
            </div>
            <div class="stack" role="tabpanel" id="code-panel" aria-labelledby="code-tab-${language}">
                ${made[language] === null
                    ? html`<p>${made.unsaid}</p>`
                    : html`${filesView(recipe)} ${blockView(title, made[language], html`${hint} ${tokenHint(about)}`)}`}
            </div>
        </div>
    `;
}

/**
 * Programs that ask for one prediction and write its pictures to files, `output.0.webp` and so on.
 *
 * @param {Recipe} recipe
 * @param {{address: string, tokens: boolean}} about where it is asked, and whether with the token in `FLUX_TOKEN`
 * @param {Field[]} fields of the schema
 * @returns {{curl: string, python: string, javascript: string, predict: string|null, unsaid: string|null}} for bash,
 *     Python 3.11 and Node 20; `unsaid` is the sentence why there is no command for `script/predict`
 */
export function snippets(recipe, about, fields) {
    const names = fileNames(recipe);
    const asked = {
        url: `${about.address.replace(/\/$/, "")}/predictions`,
        tokens: about.tokens,
        inputs: sent(recipe.inputs, fields),
        loras: recipe.loras,
        names,
        suffix: recipe.inputs.output_format ?? fields.find(({ name }) => name === "output_format")?.default ?? "webp",
    };
    const unsaid = whyUnsaid(asked, fields);
    return {
        curl: curl(asked),
        python: python(asked),
        javascript: javascript(asked),
        predict: unsaid ? null : predict(asked, fields),
        unsaid,
    };
}

/** A name for each file of a recipe, no two of them alike. */
function fileNames({ inputs, loras }) {
    const names = new Map();
    for (const file of [...Object.values(inputs), ...loras.map((lora) => lora.file)]) {
        if (!(file instanceof Blob) || names.has(file)) continue;
        const taken = new Set(names.values());
        const own = file.name.replace(/^~/, "_"); // which script/predict would take for somebody's home
        let name = own;
        for (let number = 2; taken.has(name); number += 1) name = `${number}-${own}`;
        names.set(file, name);
    }
    return names;
}

function mediaType(file) {
    return file.type || "application/octet-stream";
}

// cURL

/** The body comes by a here-document: unlike an argument, that may be as large as files are. */
function curl({ url, tokens, inputs, loras, names, suffix }) {
    const uri = (file) => `data:${mediaType(file)};base64,$(base64 <${quoted(names.get(file))} | tr -d '\\n')`;
    const lines = inputs.map(([name, value]) => {
        return `"${name}": ${value instanceof Blob ? `"${uri(value)}"` : plainJson(value)}`;
    });
    if (loras.length > 0) {
        // JSON within JSON: its own quotes have a backslash.
        const items = loras.map(({ path, scale, file }) => {
            const written = plainJson(JSON.stringify({ path: file ? "" : path, scale })).slice(1, -1);
            return file ? written.replace('\\"\\"', () => `\\"${uri(file)}\\"`) : written;
        });
        lines.push(`"replicate_weights": "[${items.join(", ")}]"`);
    }
    const headers = ["Content-Type: application/json", ...(tokens ? ["Authorization: Bearer $FLUX_TOKEN"] : [])];
    return `curl -sS ${quoted(url)} \\
${headers.map((header) => `    -H "${header}" \\\n`).join("")}    --data-binary @- <<JSON >answer.json
{
  "input": {${lines.map((line) => `\n    ${line}`).join(",")}
  }
}
JSON
number=0
while read -r picture; do
    base64 -d <<<"$picture" >output.$number.${suffix}
    number=$((number + 1))
done < <(grep -o 'base64,[^"]*' answer.json | cut -d, -f2)
[ $number -gt 0 ] || cat answer.json
`;
}

/**
 * JSON that a here-document leaves as it is: what a shell or a terminal would read in it, \u says. The backslashes that
 * are left stand before a letter or a quote, where they are none to a shell.
 */
function plainJson(value) {
    return JSON.stringify(value).replace(/\\\\|[!$`\x7f-\x9f]/g, (found) => {
        return `\\u${found.charCodeAt(0).toString(16).padStart(4, "0")}`;
    });
}

// Python and JavaScript

function python({ url, tokens, inputs, loras, names, suffix }) {
    // JSON's texts and numbers mean the same in Python.
    const literal = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value));
    const uri = (file) => `data_uri(${literal(mediaType(file))}, ${literal(names.get(file))})`;
    const lines = inputs.map(([name, value]) => `"${name}": ${value instanceof Blob ? uri(value) : literal(value)},`);
    if (loras.length > 0) {
        const items = loras.map(({ path, scale, file }) => {
            return `        {"path": ${file ? uri(file) : literal(path)}, "scale": ${literal(scale)}},`;
        });
        lines.push(`"replicate_weights": json.dumps([\n${items.join("\n")}\n    ]),`);
    }
    const helper = `

def data_uri(kind: str, path: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"

`;
    const authorization = tokens ? `\n    "Authorization": f"Bearer {os.environ['FLUX_TOKEN']}",` : "";
    return `import base64
import json
${tokens ? "import os\n" : ""}import sys
import urllib.error
import urllib.request
from pathlib import Path
${names.size > 0 ? helper : ""}
inputs = {${lines.map((line) => `\n    ${line}`).join("")}
}
headers = {
    "Content-Type": "application/json",${authorization}
}
body = json.dumps({"input": inputs}).encode()
request = urllib.request.Request(${literal(url)}, body, headers)
try:
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
except urllib.error.HTTPError as error:
    sys.exit(f"{error.code}: {error.read().decode()}")
except urllib.error.URLError as error:
    sys.exit(f"There is no answer: {error.reason}")
if answer["status"] != "succeeded":
    sys.exit(answer.get("error") or answer["status"])
for number, picture in enumerate(answer["output"]):
    Path(f"output.{number}.${suffix}").write_bytes(base64.b64decode(picture.partition(",")[2]))
`;
}

function javascript({ url, tokens, inputs, loras, names, suffix }) {
    const literal = JSON.stringify;
    const uri = (file) => `await dataUri(${literal(mediaType(file))}, ${literal(names.get(file))})`;
    const lines = inputs.map(([name, value]) => `${name}: ${value instanceof Blob ? uri(value) : literal(value)},`);
    if (loras.length > 0) {
        const items = loras.map(({ path, scale, file }) => {
            return `        { path: ${file ? uri(file) : literal(path)}, scale: ${literal(scale)} },`;
        });
        lines.push(`replicate_weights: JSON.stringify([\n${items.join("\n")}\n    ]),`);
    }
    const helper = `
async function dataUri(kind, path) {
    return \`data:\${kind};base64,\${(await readFile(path)).toString("base64")}\`;
}
`;
    const authorization = tokens ? "\n    Authorization: `Bearer ${process.env.FLUX_TOKEN}`," : "";
    return `import { ${names.size > 0 ? "readFile, " : ""}writeFile } from "node:fs/promises";
${names.size > 0 ? helper : ""}
const input = {${lines.map((line) => `\n    ${line}`).join("")}
};
const headers = {
    "Content-Type": "application/json",${authorization}
};
const body = JSON.stringify({ input });
const response = await fetch(${literal(url)}, { method: "POST", headers, body });
if (!response.ok) {
    console.error(\`\${response.status}: \${await response.text()}\`);
    process.exit(1);
}
const { status, error, output } = await response.json();
if (status !== "succeeded") {
    console.error(error ?? status);
    process.exit(1);
}
for (const [number, picture] of output.entries()) {
    await writeFile(\`output.\${number}.${suffix}\`, Buffer.from(picture.split(",")[1], "base64"));
}
`;
}

// script/predict

function predict({ inputs, loras, names }, fields) {
    const options = predictOptions({ inputs, loras, names }, fields);
    const words = options.map(([name, text]) => `-i ${name}=${quoted(text)}`);
    const line = ["script/predict", ...words].join(" ");
    return `${line.length <= 100 ? line : ["script/predict", ...words].join(" \\\n    ")}\n`;
}

/** The text for each input, in which @ names a file; null where LoRAs that are files have no place or strength. */
function predictOptions({ inputs, loras, names }, fields) {
    const at = (file) => `@${names.get(file)}`;
    const said = new Map(inputs.map(([name, value]) => [name, value instanceof Blob ? at(value) : String(value)]));
    const files = loras.filter(({ file }) => file);
    const named = loras.filter(({ file }) => !file);
    const factor = Number(said.get("lora_scale") ?? 1);
    const { minimum, maximum } = fields.find(({ name }) => name === "lora_scale") ?? {};
    if (named.length > 0) said.set("replicate_weights", sumOf(named));
    for (const { scale, file } of files) {
        const [input, strength] = said.has("replicate_weights")
            ? ["extra_lora", "extra_lora_scale"]
            : ["replicate_weights", "lora_scale"];
        const product = Number((scale * factor).toPrecision(15));
        if (said.has(input) || product < minimum || product > maximum) return null;
        said.set(input, at(file)).set(strength, String(product));
        if (product === 1) said.delete(strength);
    }
    return [...said];
}

/** LoRAs as people write them, `zorp*0.8 + bold`; as JSON where a name or a number would be read otherwise there. */
function sumOf(loras) {
    if (!loras.every(({ path, scale }) => PLAIN.test(path) && DECIMAL.test(scale))) {
        return JSON.stringify(loras.map(({ path, scale }) => ({ path, scale })));
    }
    return loras.map(({ path, scale }) => (scale === 1 ? path : `${path}*${scale}`)).join(" + ");
}

/** Why there is no command for `script/predict`; null where there is one. */
function whyUnsaid(asked, fields) {
    const options = predictOptions(asked, fields);
    if (options === null) {
        return (
            "script/predict takes a LoRA's file as replicate_weights or extra_lora alone, at that input's strength; " +
            "what the form says needs more than that, and the other tabs have it."
        );
    }
    for (const [name, text] of options) {
        const size = new TextEncoder().encode(`${name}=${text}`).length;
        if (size > LARGEST_ARGUMENT || /\0|\p{Surrogate}/u.test(text)) {
            const reason = size > LARGEST_ARGUMENT ? "it is longer than 128 KiB" : "a character of it is no text there";
            return `No command line takes this ${name}: ${reason}; the other tabs have it.`;
        }
    }
    return null;
}

/** A word of bash that means this text, whatever is in it. */
function quoted(text) {
    if (BARE.test(text)) return text;
    // A terminal would act on these when they are pasted; only here ! needs its code too, as history.
    if (/[\0-\x09\x0b-\x1f\x7f]/.test(text)) {
        const code = (character) => `\\x${character.charCodeAt(0).toString(16).padStart(2, "0")}`;
        return `$'${text.replace(/[\0-\x1f\x7f!'\\]/g, code)}'`;
    }
    return `'${text.replaceAll("'", "'\\''")}'`;
}

// The views

/** The request as JSON; encoding takes a moment, after which the page is rendered anew. */
function requestText() {
    const [recipe, { fields }] = [snapshot(), state.schema];
    if (!encoding && !(request && request.fields === fields && isSame(request.recipe, recipe))) {
        encoding = true;
        encode(recipe, fields)
            .then((input) => JSON.stringify({ input: shortened(input) }, null, 2))
            .catch((error) => error.message)
            .then((text) => {
                request = { recipe, fields, text };
                encoding = false;
                changed();
            });
    }
    return request?.text ?? "";
}

/** Whether two recipes say the same, with the same files. */
function isSame(one, other) {
    const flat = ({ inputs, loras }) => [
        ...Object.entries(inputs).flat(),
        ...loras.flatMap(({ path, scale, file }) => [path, scale, file]),
    ];
    const [values, others] = [flat(one), flat(other)];
    return values.length === others.length && values.every((value, index) => value === others[index]);
}

function languageTab(name) {
    return html`
        <button
            role="tab"
            type="button"
            id="code-tab-${name}"
            aria-controls="code-panel"
            aria-selected=${name === language}
            tabindex=${name === language ? 0 : -1}
            @click=${() => showLanguage(name)}
        >
            ${LANGUAGES[name].title}
        </button>
    `;
}

function showLanguage(name) {
    language = name;
    changed();
}

/** The arrow keys of the list of tabs. */
function moveTab(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const names = Object.keys(LANGUAGES);
    showLanguage(names[(names.indexOf(language) + step + names.length) % names.length]);
    queueMicrotask(() => document.getElementById(`code-tab-${language}`).focus());
}

function tokenHint({ tokens }) {
    return tokens ? html`It reads your token from the variable <code>FLUX_TOKEN</code>.` : nothing;
}

/** The files that the program reads, some of which were made on this page. */
function filesView(recipe) {
    const files = [...fileNames(recipe)];
    if (files.length === 0) return nothing;
    return html`
        <div class="row code-files">
            <span>${files.length === 1 ? "This file" : "These files"} must lie beside it:</span>
            ${files.map(
                ([file, name]) => html`
                    <button class="chip" type="button" @click=${() => download(file, name)}>Download ${name}</button>
                `,
            )}
        </div>
    `;
}

/** A text with a button that copies it, under a heading. */
function blockView(title, text, heading = html`<h2>${title}</h2>`) {
    return html`
        <section class="code-block" aria-label=${title}>
            <div class="code-head">
                <div>${heading}</div>
                <button class="button quiet" type="button" aria-label="Copy ${title}" @click=${copy}>
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
    const text = block.textContent;
    try {
        await navigator.clipboard.writeText(text);
    } catch {
        // A page that came over plain HTTP from another machine has no clipboard: what is selected can be copied.
        getSelection().selectAllChildren(block);
        if (!document.execCommand("copy")) {
            announce("It is selected; copy it with the keyboard.");
            return;
        }
    }
    copied = text;
    announce("Copied.");
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

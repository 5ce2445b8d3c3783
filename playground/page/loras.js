/**
 * The list of chosen LoRAs: adding, strengths, and what is remembered of those that were drawn with.
 */

import { MOST_LORAS, unshared } from "./share.js";
import { changed, state } from "./store.js";
import { html, noChange, nothing } from "./vendor/lit-html.js";

/** The input that carries the list. */
export const LORAS = "replicate_weights";
const LARGEST_SCALE = 10;
const LONGEST_REFERENCE = 8192; // characters, as the server takes them
const SUFFIXES = /\.(safetensors|tar|tar\.gz|tgz|zip)$/i;
// Files of one request together: a server takes bodies of 100 MiB, and base64 makes four bytes of three.
const MOST_BYTES = 70_000_000;
const CHIPS = 12; // names that are shown before anything is typed
const EXAMPLE = 'a list such as [{"path": "owner/name", "scale": 0.8}]';

const KEY = "flux-sprites.loras";
const MOST_RECENT = 12;

let typed = ""; // in the field for one more
let recent = readRecent();
const learned = new Map(); // trigger words by path, also of what is not kept beyond this visit

/**
 * The chosen LoRAs and the field that adds one. What the server says of the input is shown by whoever calls this,
 * in the element `problem-replicate_weights`.
 */
export function lorasView() {
    return html`
        <div
            class="loras"
            @dragover=${dragOver}
            @dragleave=${({ currentTarget }) => currentTarget.classList.remove("loras-over")}
            @drop=${drop}
        >
            ${state.loras.length > 0 ? html`<ol class="loras-list">${state.loras.map(loraView)}</ol>` : nothing}
            ${state.loras.length < MOST_LORAS
                ? addView()
                : html`<p class="hint">These are ${MOST_LORAS} LoRAs, the most that a picture can have.</p>`}
        </div>
    `;
}

/**
 * Choose one more LoRA, or several that are named in one text: a sum such as `zorp*0.8 + bold`, or a list in JSON.
 * What cannot be chosen is refused with a sentence beside the field.
 *
 * @param {string|File} source a reference, or a file of weights
 * @returns {boolean} whether it was chosen
 */
export function addLora(source) {
    delete state.problems[LORAS];
    try {
        const more = source instanceof File ? [fromFile(source)] : takeApart(source);
        const count = state.loras.length + more.length;
        if (count > MOST_LORAS) throw new Error(`That would be ${count} LoRAs; a picture can have ${MOST_LORAS}.`);
        state.loras = [...state.loras, ...more];
        return true;
    } catch (error) {
        state.problems[LORAS] = error.message;
        return false;
    } finally {
        changed();
    }
}

/** Add what stands in the field though nobody pressed its button; false where it is refused. */
export function addTyped() {
    if (typed.trim() === "") return true;
    if (!addLora(typed)) return false;
    typed = "";
    return true;
}

/** Empty the field for one more. */
export function clearTyped() {
    typed = "";
}

/** Whether every chosen LoRA has a strength that can be sent. */
export function lorasAreRight() {
    return state.loras.every((lora) => scaleProblem(lora) === null);
}

/**
 * Why a file cannot go along with those of the form; null when it can.
 *
 * @param {File} file
 * @param {*} replaced what is there in its place now
 */
export function sizeProblem(file, replaced = null) {
    const others = [...Object.values(state.inputs), ...state.loras.map((lora) => lora.file)];
    const sizes = others.filter((other) => other instanceof Blob && other !== replaced).map(({ size }) => size);
    const sum = sizes.reduce((one, other) => one + other, file.size);
    if (sum <= MOST_BYTES) return null;
    return (
        `With ${file.name} the files would have ${megabytes(sum)}, and a request carries ${megabytes(MOST_BYTES)}; ` +
        "give the address where it lies, or, of a LoRA, its name in the server's library."
    );
}

/** A size as people read it. */
export function megabytes(bytes) {
    return bytes < 100_000 ? `${Math.ceil(bytes / 1000)} kB` : `${Number((bytes / 1e6).toFixed(1))} MB`;
}

/**
 * Learn from a job that was drawn: its LoRAs can be chosen again by a click, and their trigger words are known.
 *
 * @param {Job} job
 */
export function rememberLoras({ status, recipe, answer }) {
    if (status !== "succeeded") return;
    // The answer tells of them in the list's order, by names that may be spelled otherwise than what was asked for.
    const told = answer?.metrics?.loras ?? [];
    recipe.loras.forEach(({ path }, index) => learned.set(path, wordsOf(told[index])));
    const paths = recipe.loras.filter(isKeepable).map(({ path }) => path);
    const known = recent.map(({ path }) => path);
    const words = new Map(recent.map(({ path, words }) => [path, words]));
    const newest = [...new Set([...paths, ...known])].slice(0, MOST_RECENT);
    recent = newest.map((path) => ({ path, words: learned.get(path) ?? words.get(path) ?? [] }));
    try {
        localStorage.setItem(KEY, JSON.stringify(recent));
    } catch {
        // A private window keeps nothing: they are known until it is closed.
    }
    changed();
}

/** The trigger words that an answer tells of a LoRA; another server may say anything there. */
function wordsOf(told) {
    const words = Array.isArray(told?.trigger_words) ? told.trigger_words : [];
    return words.filter((word) => typeof word === "string" && word !== "");
}

/**
 * What wakes a LoRA in a prompt, as the last answer with it said.
 *
 * @param {string} path as in the list
 * @returns {string[]}
 */
export function triggerWords(path) {
    return learned.get(path) ?? recent.find((known) => known.path === path)?.words ?? [];
}

function loraView(lora, index) {
    const problem = scaleProblem(lora);
    const id = `lora-${index}`;
    const name = lora.file ? html`${lora.path} <span class="quiet">${megabytes(lora.file.size)}</span>` : lora.path;
    const setScale = ({ target }) => {
        // An emptied field stands for the default; of what is no number, a field of numbers says nothing.
        lora.scale = target.validity.badInput ? NaN : target.value === "" ? 1 : Number(target.value);
        changed();
    };
    const text = document.activeElement?.id === id || Number.isNaN(lora.scale) ? noChange : Object(String(lora.scale));
    return html`
        <li class="loras-item">
            <div class="loras-head">
                <span class="loras-name" title=${lora.path}>${name}</span>
                <button
                    class="icon-button"
                    type="button"
                    aria-label="Remove ${lora.path}"
                    @click=${() => remove(index)}
                >
                    ✕
                </button>
            </div>
            <div class="form-slider">
                <input
                    type="range"
                    min="-1"
                    max="2"
                    step="0.05"
                    aria-label="Strength of ${lora.path}"
                    .value=${Object(String(lora.scale))}
                    @input=${setScale}
                />
                <input
                    type="number"
                    id=${id}
                    min=${-LARGEST_SCALE}
                    max=${LARGEST_SCALE}
                    step="0.05"
                    aria-label="Strength of ${lora.path}"
                    aria-invalid=${problem !== null}
                    aria-describedby=${problem ? `problem-${id}` : nothing}
                    .value=${text}
                    @input=${setScale}
                    @blur=${changed}
                />
            </div>
            ${problem ? html`<p class="problem" id="problem-${id}">${problem}</p>` : nothing}
        </li>
    `;
}

function addView() {
    const names = namesToAdd();
    const isWrong = LORAS in state.problems;
    const type = ({ target }) => {
        typed = target.value;
        delete state.problems[LORAS];
        changed();
    };
    const onEnter = (event) => {
        if (event.key !== "Enter" || event.ctrlKey || event.metaKey || typed.trim() === "") return;
        event.preventDefault();
        addTyped();
    };
    return html`
        <div class="loras-add">
            <input
                type="text"
                id="field-${LORAS}"
                list="loras-names"
                aria-label="Add a LoRA"
                placeholder="Name or address"
                autocomplete="off"
                autocapitalize="none"
                spellcheck="false"
                aria-invalid=${isWrong}
                aria-describedby=${isWrong ? `problem-${LORAS}` : nothing}
                .value=${Object(typed)}
                @input=${type}
                @keydown=${onEnter}
            />
            <datalist id="loras-names">${names.map((name) => html`<option value=${name}></option>`)}</datalist>
            ${typed.trim() !== ""
                ? html`<button class="button" type="button" @click=${press}>Add</button>`
                : html`
                      <span class="form-upload">
                          <input
                              class="visually-hidden"
                              type="file"
                              id="loras-file"
                              multiple
                              accept=".safetensors,.tar,.gz,.tgz,.zip"
                              aria-label="Files of LoRAs"
                              @change=${choose}
                          />
                          <label class="button" for="loras-file">File…</label>
                      </span>
                  `}
        </div>
        ${typed === "" && names.length > 0
            ? html`<div class="row" role="group" aria-label="LoRAs to add">
                  ${names.slice(0, CHIPS).map(
                      (name) => html`
                          <button
                              class="chip loras-chip"
                              type="button"
                              aria-label="Add ${name}"
                              @click=${() => addLora(name)}
                          >
                              <span aria-hidden="true">+</span> ${name}
                          </button>
                      `,
                  )}
              </div>`
            : nothing}
    `;
}

/** The server's library and what was drawn with lately, without what is chosen; by typing, that can be added again. */
function namesToAdd() {
    const chosen = new Set(state.loras.map(({ path }) => path));
    return [...new Set([...state.library, ...recent.map(({ path }) => path)])].filter((name) => !chosen.has(name));
}

/** The button goes with the text, so the focus goes back to the field. */
function press() {
    addTyped();
    document.getElementById(`field-${LORAS}`)?.focus();
}

function remove(index) {
    state.loras = state.loras.filter((_, other) => other !== index);
    delete state.problems[LORAS];
    changed();
    queueMicrotask(() => document.getElementById(`field-${LORAS}`)?.focus());
}

function choose({ target }) {
    addFiles([...target.files]);
    target.value = ""; // so that the same file can be chosen again
}

function dragOver(event) {
    event.preventDefault(); // else nothing can be dropped
    event.currentTarget.classList.add("loras-over");
}

function drop(event) {
    event.preventDefault();
    event.currentTarget.classList.remove("loras-over");
    const text = event.dataTransfer.getData("text/uri-list") || event.dataTransfer.getData("text/plain");
    if (event.dataTransfer.files.length > 0) addFiles([...event.dataTransfer.files]);
    else if (text) addLora(text);
}

/** As many as there is room for; the sentence is about the first that has none. */
function addFiles(files) {
    files.every(addLora);
}

function scaleProblem({ scale }) {
    if (Math.abs(scale) <= LARGEST_SCALE) return null;
    return `The strength must be a number from ${-LARGEST_SCALE} to ${LARGEST_SCALE}.`;
}

function fromFile(file) {
    if (!SUFFIXES.test(file.name)) {
        throw new Error(`${file.name} is no file of a LoRA; it must end in .safetensors, .tar, .tar.gz, .tgz or .zip.`);
    }
    const problem = sizeProblem(file);
    if (problem) throw new Error(problem);
    return { path: file.name, scale: 1, file };
}

/** The LoRAs that a text names. Two addresses with " + " between them are two LoRAs. */
function takeApart(text) {
    const bare = text.trim();
    if (bare === "") throw new Error("A LoRA must be named: by a name of the library, owner/name or an address.");
    if (/^[[{]/.test(bare)) return fromJson(bare);
    const terms = bare.split(/\s\+\s/).map(readTerm);
    // What has a blank in it may be a file whose name has a plus in it; the server says whether it can be fetched.
    const isSum = terms.every(({ path }) => /^\S+$/.test(path));
    return (isSum ? terms : [{ path: bare, scale: 1, file: null }]).map(checked);
}

/** "zorp*0.8" → zorp, with strength 0.8. */
function readTerm(term) {
    const found = /^(.*\S)\s*\*\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))$/s.exec(term.trim());
    return { path: found?.[1] ?? term.trim(), scale: Number(found?.[2] ?? 1), file: null };
}

function fromJson(text) {
    let items;
    try {
        items = JSON.parse(text);
    } catch {
        items = null;
    }
    if (!Array.isArray(items) || items.length === 0 || !items.every((item) => typeof item?.path === "string")) {
        throw new Error(`A text that begins with [ or { is read as JSON; it must be ${EXAMPLE}.`);
    }
    const more = items.flatMap(Object.keys).find((key) => key !== "path" && key !== "scale");
    // Strengths of single blocks have no place in the list, and would be lost without a word.
    if (more) throw new Error(`This list says ${more}, which cannot be set here; it goes into the second LoRA input.`);
    return items.map(({ path, scale }) => checked({ path: path.trim(), scale: scale ?? 1, file: null }));
}

function checked(lora) {
    if (lora.path === "") throw new Error("A LoRA of this text has no name.");
    const { length } = lora.path;
    if (/^data:/i.test(lora.path)) throw new Error("A data: URI is not taken here; choose or drop the file itself.");
    if (length > LONGEST_REFERENCE) {
        throw new Error(`A name or an address has at most ${LONGEST_REFERENCE} characters; this one has ${length}.`);
    }
    if (typeof lora.scale !== "number" || scaleProblem(lora)) {
        throw new Error(`${lora.path.slice(0, 80)} must have a strength from ${-LARGEST_SCALE} to ${LARGEST_SCALE}.`);
    }
    return lora;
}

/** Whether a LoRA's reference may stay in the browser: what must not be shared, such as a login, must not. */
function isKeepable(lora) {
    return unshared({ inputs: {}, loras: [lora] }).length === 0;
}

function readRecent() {
    try {
        const kept = JSON.parse(localStorage.getItem(KEY)) ?? [];
        return kept.filter(({ path, words }) => typeof path === "string" && Array.isArray(words));
    } catch {
        return []; // nothing may be kept here, or it is not ours
    }
}

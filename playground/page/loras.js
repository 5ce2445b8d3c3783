/** The list of chosen LoRAs: adding, strengths, and the LoRAs of earlier drawings. */

import { dropTarget, fileButton, focusOn, labelledButton, sizeText, slider } from "./browser.js";
import { numberInput } from "./controls.js";
import { edit, isWrong, problemView, sizeProblem, typed, valueOf } from "./field.js";
import { isLoraFile, isPrivate, LARGEST_STRENGTH, loraProblem, LORAS, MOST_LORAS, readLora, SUFFIXES } from "./lora.js";
import { meaningOf } from "./schema.js";
import { change, changed, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";
import { repeat } from "./vendor/repeat.js";

const STRENGTH = { type: "number", minimum: -LARGEST_STRENGTH, maximum: LARGEST_STRENGTH, step: 0.05, default: 1 };
const AIMED_AT = { minimum: -1, maximum: 2, step: 0.05 }; // by the slider; larger strengths are typed
const CHIPS = 12; // names that are shown before anything is typed
const ENDINGS = `${SUFFIXES.slice(0, -1).join(", ")} or ${SUFFIXES.at(-1)}`;
// Of ".tar.gz", browsers know the end alone.
const ACCEPTED = SUFFIXES.map((suffix) => suffix.slice(suffix.lastIndexOf("."))).join();
const FILES = { id: "loras-file", label: "Files of LoRAs", accept: ACCEPTED, multiple: true, take: addFiles };
const EXAMPLE = 'a list such as [{"path": "owner/name", "scale": 0.8}]';

const KEY = "flux-sprites.loras";
const MOST_RECENT = 12;

const { dragover, dragleave, drop } = dropTarget("loras-over", takeDropped);

const triggerWords = new Map(readRecent()); // by path, also of LoRAs that are not kept beyond this visit
let recent = [...triggerWords.keys()]; // paths of the LoRAs that are kept, the newest first

/** The chosen LoRAs, the field that adds one, and the problem of the input that carries them. */
export function lorasView() {
    const full = html`<p class="hint">These are ${MOST_LORAS} LoRAs, the most that a picture can have.</p>`;
    const list = html`<ol class="loras-list">${repeat(state.loras, (lora) => lora, loraView)}</ol>`;
    return html`
        <div class="loras" @dragover=${dragover} @dragleave=${dragleave} @drop=${drop}>
            ${state.loras.length > 0 ? list : nothing}
            ${state.loras.length < MOST_LORAS ? addView() : full}
        </div>
        ${problemView(LORAS)}
    `;
}

/** The known trigger words of the chosen LoRAs, to put into the prompt or take out of it. */
export function wordsView(field) {
    const prompt = String(valueOf(field) ?? field.default ?? "");
    const known = [...new Set(state.loras.flatMap(({ path }) => triggerWords.get(path) ?? []))];
    if (known.length === 0) return nothing;
    const wordView = (word) => {
        const pressed = prompt.includes(word);
        const toggle = () => edit(field, pressed ? withoutWord(prompt, word) : withWord(prompt, word));
        return labelledButton(word, `${word} in the prompt`, toggle, { kind: "chip", pressed });
    };
    return html`
        <div class="row form-words" role="group" aria-label="Trigger words">${known.map(wordView)}</div>
    `;
}

/**
 * Choose a LoRA's file, or what a text names: one LoRA, a sum such as `zorp*0.8 + bold`, or a list in JSON. If they
 * cannot be chosen, a sentence beside the field says why, and it returns false.
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

/** Add what was typed into the field and not added yet; false where it is refused. */
export function addTyped() {
    if (state.typedLora.trim() === "") return true;
    if (!addLora(state.typedLora)) return false;
    state.typedLora = "";
    return true;
}

export const lorasAreRight = () => state.loras.every((lora) => loraProblem(lora) === null);

// One LoRA

function loraView(lora, index) {
    const problem = loraProblem(lora);
    const id = `lora-${index}`;
    const label = `Strength of ${lora.path}`;
    const set = (scale) => change(lora, { scale: scale ?? STRENGTH.default });
    const isMeantBy = (text) => Object.is(meaningOf(STRENGTH, text) ?? STRENGTH.default, lora.scale);
    return html`
        <li class="loras-item">
            <div class="loras-head">
                <span class="loras-name" title=${lora.path}>
                    ${lora.path} ${lora.file ? html`<span class="quiet">${sizeText(lora.file.size)}</span>` : nothing}
                </span>
                ${labelledButton("✕", `Remove ${lora.path}`, () => remove(lora))}
            </div>
            <div class="form-slider">
                ${slider(AIMED_AT, { label, value: Number.isFinite(lora.scale) ? lora.scale : STRENGTH.default, set })}
                ${numberInput(STRENGTH, {
                    id,
                    label,
                    isWrong: problem !== null,
                    describedBy: problem ? `problem-${id}` : nothing,
                    value: lora.scale,
                    text: typed(String(lora.scale), isMeantBy),
                    set,
                    leave: changed,
                })}
            </div>
            ${problem ? html`<p class="problem" id="problem-${id}">${problem}</p>` : nothing}
        </li>
    `;
}

function remove(lora) {
    state.loras = state.loras.filter((other) => other !== lora);
    delete state.problems[LORAS];
    focusOn(`#field-${LORAS}`);
}

// One more

function addView() {
    const { typedLora } = state;
    const names = namesToAdd();
    const press = () => {
        addTyped();
        focusOn(`#field-${LORAS}`); // the button goes with the text
    };
    const addButton = html`<button class="button" type="button" @click=${press}>Add</button>`;
    return html`
        <div class="loras-add">
            ${nameView()}
            <datalist id="loras-names">${names.map((name) => html`<option value=${name}></option>`)}</datalist>
            ${typedLora.trim() === "" ? fileButton("File…", FILES) : addButton}
        </div>
        ${typedLora === "" && names.length > 0 ? chipsView(names.slice(0, CHIPS)) : nothing}
    `;
}

function nameView() {
    const type = ({ target }) => {
        delete state.problems[LORAS];
        change(state, { typedLora: target.value });
    };
    const onEnter = (event) => {
        if (event.key !== "Enter" || event.ctrlKey || event.metaKey || state.typedLora.trim() === "") return;
        event.preventDefault();
        addTyped();
    };
    return html`
        <input
            type="text"
            id="field-${LORAS}"
            list="loras-names"
            aria-label="Add a LoRA"
            placeholder="Name or address"
            autocapitalize="none"
            spellcheck="false"
            aria-invalid=${isWrong(LORAS)}
            aria-describedby=${isWrong(LORAS) ? `problem-${LORAS}` : nothing}
            .value=${typed(state.typedLora, (text) => text === state.typedLora)}
            @input=${type}
            @keydown=${onEnter}
        />
    `;
}

function chipsView(names) {
    const chipView = (name) => {
        const text = html`<span aria-hidden="true">+</span> ${name}`;
        return labelledButton(text, `Add ${name}`, () => addLora(name), { kind: "chip loras-chip" });
    };
    return html`<div class="row" role="group" aria-label="LoRAs to add">${names.map(chipView)}</div>`;
}

/** The server's library and the LoRAs of earlier drawings, without those chosen, which can be typed again. */
function namesToAdd() {
    const chosen = new Set(state.loras.map(({ path }) => path));
    return [...new Set([...state.library, ...recent])].filter((name) => !chosen.has(name));
}

function takeDropped(transfer) {
    const text = transfer.getData("text/uri-list") || transfer.getData("text/plain");
    if (transfer.files.length > 0) addFiles([...transfer.files]);
    else if (text) addLora(text);
}

/** Add as many as there is room for; the sentence is about the first that has none. */
function addFiles(files) {
    files.every(addLora);
}

function fromFile(file) {
    if (!isLoraFile(file)) throw new Error(`${file.name} is no file of a LoRA; it must end in ${ENDINGS}.`);
    const problem = sizeProblem(file);
    if (problem) throw new Error(problem);
    return { path: file.name, scale: 1, file };
}

/** The LoRAs that a text names. Two addresses with " + " between them are two LoRAs. */
function takeApart(text) {
    const bare = text.trim();
    if (/^[[{]/.test(bare)) return fromJson(bare);
    const terms = bare.split(/\s\+\s/).map(readLora);
    // A name with a blank may be one file with a plus in its name; the server says whether it can be fetched.
    const isSum = terms.every(({ path }) => /^\S+$/.test(path));
    return (isSum ? terms : [readLora(bare)]).map(checked);
}

function fromJson(text) {
    const items = meaningOf({ type: "array" }, text);
    const hasPaths = Array.isArray(items) && items.every((item) => typeof item?.path === "string");
    if (!hasPaths || items.length === 0) {
        throw new Error(`A text that begins with [ or { is read as JSON; it must be ${EXAMPLE}.`);
    }
    const more = items.flatMap(Object.keys).find((key) => key !== "path" && key !== "scale");
    // Strengths of single blocks have no place in the list, and would be lost without a word.
    if (more) throw new Error(`This list says ${more}, which cannot be set here; it goes into the second LoRA input.`);
    return items.map(({ path, scale }) => checked({ path: path.trim(), scale: scale ?? 1, file: null }));
}

function checked(lora) {
    const problem = loraProblem(lora);
    if (problem) throw new Error(problem);
    return lora;
}

// LoRAs of earlier drawings

/** Learn from a job that succeeded: its LoRAs can be chosen again by a click, and their trigger words are known. */
export function rememberLoras({ recipe, answer }) {
    // The answer lists them in the same order, but may spell their names otherwise.
    const told = answer?.metrics?.loras ?? [];
    recipe.loras.forEach(({ path }, index) => triggerWords.set(path, wordsOf(told[index])));
    const paths = recipe.loras.filter(({ path, file }) => !file && !isPrivate(path)).map(({ path }) => path);
    setRecent([...new Set([...paths, ...recent])].slice(0, MOST_RECENT));
}

export function forgetLoras() {
    triggerWords.clear();
    setRecent([]);
}

function setRecent(paths) {
    recent = paths;
    try {
        localStorage.setItem(KEY, JSON.stringify(recent.map((path) => ({ path, words: triggerWords.get(path) }))));
    } catch {
        // A private window keeps nothing: they are known until it is closed.
    }
    changed();
}

/** The trigger words that an answer tells of a LoRA; another server may say anything there. */
function wordsOf(told) {
    const said = Array.isArray(told?.trigger_words) ? told.trigger_words : [];
    return said.filter((word) => typeof word === "string" && word !== "");
}

const withWord = (prompt, word) => [prompt.trim(), word].filter(Boolean).join(", ");

function withoutWord(prompt, word) {
    const at = prompt.indexOf(word);
    const [before, after] = [prompt.slice(0, at), prompt.slice(at + word.length)];
    return `${before.replace(/,?\s*$/, "")}${after}`.replace(/^[,\s]+/, "");
}

function readRecent() {
    try {
        const kept = JSON.parse(localStorage.getItem(KEY)) ?? [];
        const known = kept.filter(({ path, words }) => typeof path === "string" && Array.isArray(words));
        return known.map(({ path, words }) => [path, words]);
    } catch {
        return []; // nothing may be kept here, or it is not ours
    }
}

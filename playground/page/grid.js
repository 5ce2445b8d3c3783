/**
 * A grid: one picture for each pair of values of two inputs, all else being equal.
 */

import { download } from "./code.js";
import { keep } from "./history.js";
import { cancelAll, enqueue } from "./jobs.js";
import { addTyped, LORAS, lorasAreRight } from "./loras.js";
import { imageSize } from "./mask.js";
import { snapshot } from "./recipe.js";
import { isShown, problemOf } from "./schema.js";
import { announce, changed, note, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

/**
 * @typedef {object} Axis what may change along a side of the grid
 * @property {string} id as it is part of a file's name
 * @property {string} label
 * @property {Field} field what its values are checked by
 * @property {function(Recipe, *): Recipe} put the recipe with a value in it
 * @property {function(*): string} show a value as people read it
 */
/** @typedef {{axis: Axis, values: Array, texts: string[]}} Side the texts are the values as they are shown */
/** @typedef {{x: Side, y: Side, title: string, rows: Job[][]}} Run one grid; a row for each value of y */

const ASK_ABOVE = 36; // cells
const MOST_VALUES = 100; // of an axis
const DRAWN_SEEDS = 2 ** 32; // seeds that nobody chose are below
const EXAMPLES = { lora_scale: "0, 0.5, 1", guidance_scale: "2, 3, 4", num_inference_steps: "4, 14, 28" };

const NUMBER = String.raw`[+-]?(?:\d+(?:\.\d*)?|\.\d+)`;
const ONE_NUMBER = new RegExp(`^${NUMBER}(?:e[+-]?\\d+)?$`, "i");
const RANGE = new RegExp(`^(${NUMBER})\\s*[-–:]\\s*(${NUMBER})(?:\\s*:\\s*(${NUMBER}))?$`); // 1-4, 0:1:0.25

// What a canvas may have in every browser, a side and in all.
const LARGEST_SIDE = 16_384;
const LARGEST_AREA = 64_000_000;
const LINE = 1.35; // the height of a line of text, in its letters' size

Object.assign(state.grid, {
    chosen: {}, // the id of the axis x, and of y
    texts: {}, // the values as they were typed, by axis
    asking: false, // whether so many cells are meant
    run: null,
});

const urls = new Map(); // blob: addresses of the cells' pictures, by Blob

/** The tab: what changes along x and y, and the cells, which fill while other tabs are open too. */
export function gridView() {
    if (axes().length < 2) return html`<p>A grid needs two inputs that can change, and this server has fewer.</p>`;
    const sides = readSides();
    return html`
        <div class="stack grid">
            <form class="stack panel" id="grid-form" @submit=${submit}>
                <div class="grid-sides">${sideView("x", "Columns", sides)} ${sideView("y", "Rows", sides)}</div>
                ${state.grid.asking ? askView(sides) : startView(sides)}
            </form>
            ${state.grid.run ? runView(state.grid.run) : nothing}
        </div>
    `;
}

/**
 * Show the picture of a cell in the stage, among the others.
 *
 * @param {Picture} picture
 */
export function openCell(picture) {
    if (!state.pictures.includes(picture)) {
        state.pictures = [picture, ...state.pictures];
        keep([picture]);
    }
    Object.assign(state, { selected: picture.id, compare: null, tab: "picture" });
    changed();
}

/**
 * The values of an axis as they are typed: separated by commas, numbers in ranges such as 1-4 and 0:1:0.25 too, and
 * words one per line.
 *
 * @param {string} text
 * @param {Field} field what they are checked by
 * @returns {{values: Array, problem: string|null}} the problem is the sentence on the first value that is wrong
 */
export function readValues(text, field) {
    const parts = isWords(field) ? text.split("\n") : text.split(",").map((part) => part.trim());
    const items = parts.filter((part) => part.trim() !== "");
    if (items.length === 0) return { values: [], problem: "At least one value is needed." };
    const values = [];
    for (const item of items) {
        const more = itemValues(item, field);
        const problem = values.length + more.length > MOST_VALUES ? tooMany(item) : wrongValue(item, more, field);
        if (problem) return { values: [], problem };
        values.push(...more);
    }
    return { values, problem: null };
}

function tooMany(item) {
    return `With ${item} there would be more than ${MOST_VALUES} values.`;
}

function wrongValue(item, values, field) {
    const problems = values.map((value) => {
        if (field.type === "boolean" && typeof value !== "boolean") return `${field.label} must be true or false.`;
        return problemOf(field, value);
    });
    const problem = problems.find((it) => it !== null);
    return problem ? `“${item}” cannot be: ${problem}` : null;
}

/** The values that one item means; itself, or NaN, where it means none. */
function itemValues(item, field) {
    if (field.enum) return [field.enum.find((choice) => String(choice) === item) ?? item];
    if (field.type === "boolean") return [{ true: true, false: false }[item.toLowerCase()] ?? item];
    if (isWords(field)) return [item];
    if (ONE_NUMBER.test(item)) return [Number(item)];
    const [, first, last, step = "1"] = RANGE.exec(item) ?? [item, NaN, NaN];
    return rangeValues(String(first), Number(last), String(step));
}

/** From the first number towards the last, in the decimals that were typed; where there are too many, one too many. */
function rangeValues(first, last, step) {
    const start = Number(first);
    const width = Math.abs(Number(step));
    const count = Math.floor(Math.abs(last - start) / width + 1e-9) + 1;
    if (!Number.isFinite(count)) return [NaN];
    const decimals = Math.max(...[first, step].map((text) => text.split(".")[1]?.length ?? 0));
    return Array.from({ length: Math.min(count, MOST_VALUES + 1) }, (_, index) => {
        return Number((start + Math.sign(last - start) * index * width).toFixed(decimals));
    });
}

function isWords({ type, enum: choices }) {
    return type === "string" && !choices;
}

// What changes

/** @returns {Axis[]} what may change beside what the form says: inputs that count, and the strength of each LoRA. */
function axes() {
    const fields = state.schema.fields.filter((field) => isAxis(field) && isShown(field, state.inputs));
    return [...fields.map(fieldAxis), ...state.loras.map(scaleAxis)];
}

function isAxis({ name, type, format }) {
    return ["string", "boolean", "number", "integer"].includes(type) && format !== "uri" && name !== "num_outputs";
}

function fieldAxis(field) {
    const needed = { ...field, required: true };
    if (field.name === LORAS) {
        const put = ({ inputs }, path) => ({ inputs, loras: [{ path, scale: 1, file: null }] });
        return { id: "lora", label: "LoRA", field: { ...needed, label: "LoRA" }, put, show: shownPath };
    }
    const put = ({ inputs, loras }, value) => ({ inputs: { ...inputs, [field.name]: value }, loras });
    return { id: field.name, label: field.label, field: needed, put, show: String };
}

function scaleAxis({ path, file }, index) {
    const name = file ? path : shownPath(path);
    const label = `Scale of ${name}`;
    const field = { label, type: "number", format: null, enum: null, minimum: -10, maximum: 10, required: true };
    const put = ({ inputs, loras }, scale) => ({ inputs, loras: loras.with(index, { ...loras[index], scale }) });
    return { id: `scale_${index + 1}_${name}`, label, field, put, show: String };
}

/** A reference as it may be shown: of an address, neither who asks nor what it is asked with. */
function shownPath(path) {
    return path.replace(/[?#].*/, "").replace(/^https?:\/\/([^/]*@)?/i, "");
}

/** The chosen axes with the values that they have now. */
function readSides() {
    const all = axes();
    const find = (id) => all.find((axis) => axis.id === id);
    const { chosen, texts } = state.grid;
    const x = find(chosen.x) ?? find(state.loras.length > 0 ? "lora_scale" : "guidance_scale") ?? all[0];
    const y = [find(chosen.y), find("seed"), ...all].find((axis) => axis && axis !== x);
    const side = (axis) => {
        const text = texts[axis.id] ?? usualValues(axis);
        const { values, problem } = readValues(text, axis.field);
        return { axis, text, values, problem, texts: values.map(axis.show) };
    };
    return { all, x: side(x), y: side(y) };
}

/** Values to begin with. */
function usualValues({ id, field }) {
    if (id in EXAMPLES) return EXAMPLES[id];
    if (id.startsWith("scale_")) return EXAMPLES.lora_scale;
    if (id === "lora") return state.library.join("\n");
    if (id === "seed") {
        const shown = state.pictures.find((picture) => picture.id === state.selected) ?? state.pictures[0];
        const seed = state.inputs.seed ?? shown?.seed ?? 1;
        return `${seed}, ${seed + 1}`;
    }
    if (field.enum) return field.enum.join(", ");
    if (field.type === "boolean") return "false, true";
    return String(state.inputs[id] ?? field.default ?? "");
}

// The grid

function submit(event) {
    event.preventDefault();
    if (!addTyped()) return;
    const sides = readSides();
    if (sides.x.problem || sides.y.problem) {
        document.getElementById(sides.x.problem ? "grid-x-values" : "grid-y-values").focus();
        return;
    }
    if (!canStart(sides)) return;
    if (countCells(sides) > ASK_ABOVE && !state.grid.asking) {
        state.grid.asking = true;
        changedThenFocus(".grid-start");
        return;
    }
    start(sides);
}

/** Have every cell drawn, row by row. */
function start({ x, y }) {
    const recipe = snapshot();
    recipe.inputs.num_outputs = 1;
    const changes = [x.axis.id, y.axis.id];
    const isFixed = (id) => !changes.includes(id) && state.schema.fields.some(({ name }) => name === id);
    // Cells can be compared where only what the axes say differs; for a seed below 0 the server would draw one.
    if (isFixed("seed") && !(recipe.inputs.seed >= 0)) recipe.inputs.seed = Math.floor(Math.random() * DRAWN_SEEDS);
    forgetUrls();
    const rows = y.values.map((row) =>
        x.values.map((column) => enqueue(y.axis.put(x.axis.put(recipe, column), row), "cell")),
    );
    const title = [isFixed("prompt") && recipe.inputs.prompt, isFixed("seed") && `Seed ${recipe.inputs.seed}`];
    const run = { x, y, title: title.filter(Boolean).join(" · "), rows };
    Object.assign(state.grid, { run, asking: false });
    Promise.all(rows.flat().map((job) => job.done)).then(() => announce(`The grid has ended: ${counted(run)}.`));
    changedThenFocus(".grid-cancel");
}

function cancelGrid() {
    cancelAll("cell");
    changedThenFocus(".grid-start"); // the button goes
}

function countCells({ x, y }) {
    return x.values.length * y.values.length;
}

function canStart(sides) {
    return !isRunning() && ["ready", "busy"].includes(state.connection.kind) && formProblem(sides) === null;
}

/** What is wrong with the inputs that do not change. */
function formProblem({ x, y }) {
    if (!lorasAreRight()) return "The strength of a LoRA is wrong.";
    const fixed = state.schema.fields.filter(({ name }) => ![x.axis.id, y.axis.id].includes(name));
    const shown = fixed.filter((field) => isShown(field, state.inputs));
    const problems = shown.map((field) => problemOf(field, state.inputs[field.name]));
    return problems.find((problem) => problem !== null) ?? null;
}

function isRunning() {
    return state.grid.run?.rows.flat().some(({ status }) => ["queued", "waiting", "drawing"].includes(status)) ?? false;
}

/** How far a grid is, in words. */
function counted({ rows }) {
    const jobs = rows.flat();
    return `${jobs.filter(({ pictures }) => pictures.length > 0).length} of ${jobs.length} drawn`;
}

/** What a cell says while it has no picture. */
function reasonOf({ status, error, at, of }) {
    if (status === "failed") return error.startsWith("NSFW") ? "Kept back by the safety check." : error;
    if (status === "drawing") return of === null ? "Drawing" : `Step ${at} of ${of}`;
    return { queued: "Queued", waiting: error ?? "Waiting", canceled: "Cancelled", succeeded: "No picture" }[status];
}

// The views

function sideView(side, legend, sides) {
    const { axis, text, problem } = sides[side];
    const choices = sides.all.filter(({ id }) => id !== sides[side === "x" ? "y" : "x"].axis.id);
    const choose = ({ target }) => set({ chosen: { x: sides.x.axis.id, y: sides.y.axis.id, [side]: target.value } });
    const type = ({ target }) => set({ texts: { ...state.grid.texts, [axis.id]: target.value } });
    const id = `grid-${side}-values`;
    return html`
        <fieldset class="stack grid-side">
            <legend class="field-label">${legend}</legend>
            <div class="field">
                <label class="visually-hidden" for="grid-${side}">Input of the ${legend.toLowerCase()}</label>
                <select id="grid-${side}" @change=${choose}>
                    ${choices.map(
                        ({ id, label }) => html`<option value=${id} .selected=${id === axis.id}>${label}</option>`,
                    )}
                </select>
            </div>
            <div class="field">
                <label for=${id}>Values of the ${legend.toLowerCase()}</label>
                ${isWords(axis.field)
                    ? html`
                          <textarea
                              id=${id}
                              rows="3"
                              .value=${text}
                              aria-invalid=${problem !== null}
                              aria-describedby="grid-${side}-hint"
                              @input=${type}
                          ></textarea>
                      `
                    : html`
                          <input
                              id=${id}
                              type="text"
                              autocomplete="off"
                              .value=${text}
                              aria-invalid=${problem !== null}
                              aria-describedby="grid-${side}-hint"
                              @input=${type}
                          />
                      `}
                <p class=${problem ? "problem" : "hint"} id="grid-${side}-hint">${problem ?? hintOf(axis.field)}</p>
            </div>
        </fieldset>
    `;
}

function hintOf(field) {
    if (isWords(field)) return "One per line.";
    if (field.enum || field.type === "boolean") return "Separated by commas.";
    const range = field.type === "integer" ? "1-4 is 1, 2, 3, 4" : "0:1:0.25 goes from 0 to 1 by 0.25";
    return `Separated by commas; ${range}.`;
}

function set(values) {
    Object.assign(state.grid, { asking: false, ...values });
    changed();
}

function startView(sides) {
    const count = countCells(sides);
    const problem = formProblem(sides);
    return html`
        <div class="row">
            <button class="button primary grid-start" type="submit" ?disabled=${!canStart(sides)}>Draw grid</button>
            <span class="quiet">${count > 0 ? counting(count) : nothing}</span>
            ${problem ? html`<span class="problem">${problem}</span>` : nothing}
        </div>
    `;
}

function counting(count) {
    return count === 1 ? "1 picture" : `${count} pictures`;
}

function askView(sides) {
    const count = countCells(sides);
    const keepFromDrawing = () => {
        state.grid.asking = false;
        changedThenFocus(".grid-start");
    };
    return html`
        <div class="row grid-ask" role="group" aria-label="Many pictures">
            <span>These are ${count} pictures.</span>
            <button class="button primary grid-start" type="submit" ?disabled=${!canStart(sides)}>
                Draw ${count} pictures
            </button>
            <button class="button" type="button" @click=${keepFromDrawing}>Do not draw</button>
        </div>
    `;
}

function runView(run) {
    const jobs = run.rows.flat();
    const ended = jobs.filter(({ status }) => !["queued", "waiting", "drawing"].includes(status)).length;
    const drawn = jobs.some(({ pictures }) => pictures.length > 0);
    return html`
        <section class="stack" aria-label="Grid">
            <div class="row grid-bar">
                <h2>${run.title}</h2>
                <span class="quiet">${counted(run)}</span>
                ${isRunning()
                    ? html`
                          <button class="button grid-cancel" type="button" @click=${cancelGrid}>
                              Cancel grid
                          </button>
                      `
                    : nothing}
                <button class="button" type="button" ?disabled=${!drawn} @click=${() => exportPng(run)}>
                    Export PNG
                </button>
            </div>
            ${isRunning()
                ? html`<progress aria-label="Cells that have ended" max=${jobs.length} .value=${ended}></progress>`
                : nothing}
            <div class="grid-scroll" tabindex="0" role="region" aria-label="Cells">${tableView(run)}</div>
        </section>
    `;
}

function tableView({ x, y, rows }) {
    return html`
        <table class="grid-table">
            <thead>
                <tr>
                    <td></td>
                    <th scope="colgroup" colspan=${x.values.length}>${x.axis.label}</th>
                </tr>
                <tr>
                    <th scope="col">${y.axis.label}</th>
                    ${x.texts.map((text) => html`<th scope="col">${text}</th>`)}
                </tr>
            </thead>
            <tbody>
                ${rows.map(
                    (row, number) => html`
                        <tr>
                            <th scope="row">${y.texts[number]}</th>
                            ${row.map((job, column) => cellView(job, `${textOf(x, column)}, ${textOf(y, number)}`))}
                        </tr>
                    `,
                )}
            </tbody>
        </table>
    `;
}

function textOf({ axis, texts }, index) {
    return `${axis.label} ${texts[index]}`;
}

function cellView({ pictures: [picture], ...job }, name) {
    return html`
        <td>
            ${picture
                ? html`
                      <button class="grid-open" type="button" title="Open" @click=${() => openCell(picture)}>
                          <img src=${urlOf(picture.blob)} alt=${name} />
                      </button>
                  `
                : html`<div class="grid-empty" data-status=${job.status}>${reasonOf(job)}</div>`}
        </td>
    `;
}

function urlOf(blob) {
    if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
    return urls.get(blob);
}

function forgetUrls() {
    urls.forEach((url) => URL.revokeObjectURL(url));
    urls.clear();
}

/** Have the page rendered, and focus what is there then. */
function changedThenFocus(selector) {
    changed();
    queueMicrotask(() => document.querySelector(selector)?.focus());
}

// The picture of a grid

async function exportPng(run) {
    let canvas;
    try {
        canvas = await paint(run);
    } catch {
        return note("This browser cannot read one of these pictures, so it can make none of the grid.");
    }
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    const name = `grid-${run.x.axis.id}-${run.y.axis.id}`.replace(/[^\w.-]+/g, "-");
    if (blob) download(blob, `${name}.png`);
    else note("This browser has no room for a picture of this grid.");
}

/**
 * A canvas with the cells at their full size, as far as one can be that large, their names and values, and the title.
 * At least one cell has a picture.
 */
async function paint(run) {
    const blobs = run.rows.map((row) => row.map(({ pictures: [picture] }) => picture?.blob));
    const sizes = [];
    // One after the other: all of them at once may be more than a browser has room for.
    for (const blob of blobs.flat().filter(Boolean)) sizes.push(await imageSize(blob));
    const [width, height] = ["width", "height"].map((side) => Math.max(...sizes.map((size) => size[side])));
    const { backgroundColor, color, fontFamily } = getComputedStyle(document.body);
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d");
    const em = Math.max(14, Math.round(width / 28));
    const [plain, bold] = [400, 600].map((weight) => `${weight} ${em}px ${fontFamily}`);
    const { texts, x, y, whole } = layout(run, { width, height }, em, (text, font) => {
        context.font = font === "bold" ? bold : plain;
        return context.measureText(text).width;
    });

    const area = Math.sqrt(LARGEST_AREA / (whole.width * whole.height));
    const scale = Math.min(1, LARGEST_SIDE / whole.width, LARGEST_SIDE / whole.height, area);
    canvas.width = Math.floor(whole.width * scale);
    canvas.height = Math.floor(whole.height * scale);
    context.scale(scale, scale);
    context.fillStyle = backgroundColor;
    context.fillRect(0, 0, whole.width, whole.height);
    Object.assign(context, { fillStyle: color, strokeStyle: color, textBaseline: "top" });
    const write = ({ lines, at: [left, top], font }) => {
        context.font = font === "bold" ? bold : plain;
        lines.forEach((line, index) => context.fillText(line, left, top + index * em * LINE));
    };
    texts.forEach(write);
    for (const [row, line] of blobs.entries()) {
        for (const [column, blob] of line.entries()) {
            const [left, top] = [x(column), y(row)];
            if (blob) {
                const image = await createImageBitmap(blob);
                context.drawImage(image, left, top);
                image.close();
            } else {
                context.strokeRect(left + 0.5, top + 0.5, width - 1, height - 1);
                context.font = plain;
                const measure = (text) => context.measureText(text).width;
                const lines = wrapped(reasonOf(run.rows[row][column]), width - 2 * em, height / em / LINE - 2, measure);
                write({ lines, at: [left + em, top + em] });
            }
        }
    }
    return canvas;
}

/**
 * Where everything is in the picture of a grid, in pixels of its cells.
 *
 * @param {Run} run
 * @param {{width: number, height: number}} cell
 * @param {number} em the size of the letters
 * @param {function(string, "bold"|undefined): number} measure the width of a text
 * @returns {{texts: {lines: string[], at: [number, number], font: "bold"|undefined}[], x: function(number): number,
 *     y: function(number): number, whole: {width: number, height: number}}} x and y of a cell by its column and row
 */
function layout({ x: across, y: down, title }, cell, em, measure) {
    const line = em * LINE;
    const gap = em / 2;
    const bold = (text) => measure(text, "bold");
    const columns = across.texts.map((text) => wrapped(text, cell.width, 6, measure));
    const rows = down.texts.map((text) => wrapped(text, cell.width * 0.6, cell.height / line, measure));
    const corner = wrapped(down.axis.label, cell.width * 0.6, 2, bold);
    const left = em + Math.max(...rows.flat().map((text) => measure(text)), ...corner.map(bold)) + em;
    const x = (column) => left + column * (cell.width + gap);
    const width = x(columns.length) - gap + em;
    const heading = wrapped(title, width - 2 * em, 4, bold);
    const names = em + heading.length * line + gap;
    const values = names + line;
    const top = values + Math.max(corner.length, ...columns.map((lines) => lines.length)) * line + gap;
    const y = (row) => top + row * (cell.height + gap);
    const texts = [
        { lines: heading, at: [em, em], font: "bold" },
        { lines: wrapped(across.axis.label, width - left - em, 1, bold), at: [left, names], font: "bold" },
        { lines: corner, at: [em, values], font: "bold" },
        ...columns.map((lines, column) => ({ lines, at: [x(column), values] })),
        ...rows.map((lines, row) => ({ lines, at: [em, y(row)] })),
    ];
    return { texts, x, y, whole: { width, height: y(rows.length) - gap + em } };
}

/** A text in lines of at most so many pixels, cut where there are more lines than there may be. */
function wrapped(text, width, most, measure) {
    const lines = [];
    let rest = Array.from(text.replace(/\s+/g, " ").trim());
    while (rest.length > 0 && lines.length + 1 <= most) {
        let count = 1;
        while (count < rest.length && measure(rest.slice(0, count + 1).join("")) <= width) count += 1;
        const space = count < rest.length ? rest.slice(0, count + 1).lastIndexOf(" ") : -1;
        lines.push(rest.slice(0, space > 0 ? space : count).join(""));
        rest = rest.slice(space > 0 ? space + 1 : count);
    }
    return rest.length > 0 && lines.length > 0 ? [...lines.slice(0, -1), `${lines.at(-1).slice(0, -1)}…`] : lines;
}

/** A grid: one picture for each pair of values of two inputs, all else being equal. */

import { download, focusOn, urlOf } from "./browser.js";
import { canDraw } from "./connection.js";
import { snapshot } from "./field.js";
import { gridPicture } from "./grid_picture.js";
import { areApart, axesOf, cellRecipes, isWords, readValues } from "./grid_values.js";
import { keep } from "./history.js";
import { cancelJobs, enqueue, hasEnded } from "./jobs.js";
import { LORAS, loraProblem } from "./lora.js";
import { addTyped, rememberLoras } from "./loras.js";
import { fieldNamed, own, problemsOf } from "./schema.js";
import { announce, change, note, selectedPicture, state } from "./store.js";
import { html, nothing } from "./vendor/lit-html.js";

const MOST_CELLS = 400;
const ASK_ABOVE = 36; // cells
const DRAWN_SEEDS = 2 ** 32; // random seeds are below
const EXAMPLES = { lora_scale: "0, 0.5, 1", guidance_scale: "2, 3, 4", num_inference_steps: "4, 14, 28" };

const grid = {
    chosen: {}, // the id of the axis x, and of y
    texts: {}, // the values as they were typed, by axis
    asking: false, // whether a person is asked if so many cells shall be drawn
    run: null, // {x, y, title, rows}: two sides, and a row of jobs for each value of y
};

/** The tab: the inputs that change along x and y, and the cells, which fill while other tabs are open too. */
export function gridView() {
    const sides = readSides();
    if (sides === null) return html`<p>A grid needs two inputs that can change, and this server has fewer.</p>`;
    return html`
        <div class="stack grid">
            <form class="stack panel" id="grid-form" @submit=${submit}>
                <div class="grid-sides">${sideView("x", "Columns", sides)} ${sideView("y", "Rows", sides)}</div>
                ${startView(sides)}
            </form>
            ${grid.run ? runView(grid.run) : nothing}
        </div>
    `;
}

// The sides

/** The chosen axes with the values that they have now; null where no two of them can be in one grid. */
function readSides() {
    const all = axesOf(state.schema.fields, snapshot());
    const find = (id) => all.find((axis) => axis.id === id);
    const usual = find(state.loras.length > 0 ? "lora_scale" : "guidance_scale");
    const beside = (x) => [find(grid.chosen.y), find("seed"), ...all].find((axis) => axis && areApart(axis, x));
    const x = [find(grid.chosen.x), usual, ...all].find((axis) => axis && beside(axis));
    return x === undefined ? null : { all, x: readSide(x), y: readSide(beside(x)) };
}

/** A side: an axis with its values, and these as they are shown, `texts`. */
function readSide(axis) {
    const text = own(grid.texts, axis.id) ?? usualValues(axis);
    const { values, problem } = readValues(text, axis);
    return { axis, text, values, problem, texts: values.map(axis.show) };
}

function usualValues({ id, field }) {
    if (Object.hasOwn(EXAMPLES, id)) return EXAMPLES[id];
    if (id.startsWith("scale_")) return EXAMPLES.lora_scale;
    if (id === LORAS) return state.library.join("\n");
    if (id === "seed") {
        const seed = state.inputs.seed ?? selectedPicture()?.seed ?? 1;
        return `${seed}, ${seed + 1}`;
    }
    if (field.enum) return field.enum.join(", ");
    if (field.type === "boolean") return "false, true";
    return String(own(state.inputs, id) ?? field.default ?? "");
}

const countCells = ({ x, y }) => x.values.length * y.values.length;
const canStart = (sides) => !isRunning() && canDraw() && gridProblem(sides) === null;
const isRunning = () => grid.run?.rows.flat().some((job) => !hasEnded(job)) ?? false;

/** Why the cells cannot be drawn as the form is now; null when they can. */
function gridProblem(sides) {
    const count = countCells(sides);
    if (count > MOST_CELLS) return `A grid has at most ${MOST_CELLS} pictures; these would be ${count}.`;
    const cells = cellRecipes(snapshot(), sides.x, sides.y).flat();
    const problems = cells.flatMap(({ inputs, loras }) => [
        ...loras.map(loraProblem),
        ...Object.values(problemsOf(inputs, state.schema.fields)),
    ]);
    return problems.find((problem) => problem !== null) ?? null;
}

// Actions

function submit(event) {
    event.preventDefault();
    if (!addTyped()) return;
    const sides = readSides();
    if (sides.x.problem || sides.y.problem) {
        document.getElementById(sides.x.problem ? "grid-x-values" : "grid-y-values").focus();
    } else if (canStart(sides)) {
        if (countCells(sides) > ASK_ABOVE && !grid.asking) ask(true);
        else start(sides);
    }
}

/** Ask whether so many cells shall be drawn, or no longer. */
function ask(asking) {
    grid.asking = asking;
    focusOn(".grid-start");
}

function start({ x, y }) {
    const recipe = snapshot();
    const { fields } = state.schema;
    if (fieldNamed(fields, "num_outputs")) recipe.inputs.num_outputs = 1;
    const changing = [x.axis.id, y.axis.id];
    const fixed = (name) => (changing.includes(name) ? undefined : fieldNamed(fields, name));
    const seed = fixed("seed");
    // All cells get one seed, so that only the axes make them differ; below 0, the server would draw one for each.
    if (seed && !(recipe.inputs.seed >= 0)) {
        recipe.inputs.seed = Math.floor(Math.random() * Math.min(DRAWN_SEEDS, (seed.maximum ?? Infinity) + 1));
    }
    const rows = cellRecipes(recipe, x, y).map((row) => row.map((cell) => enqueue(cell, "cell")));
    const title = [fixed("prompt") && recipe.inputs.prompt, seed && `Seed ${recipe.inputs.seed}`];
    const run = { x, y, title: title.filter(Boolean).join(" · "), rows };
    Object.assign(grid, { run, asking: false });
    Promise.all(rows.flat().map((job) => job.done)).then((jobs) => {
        jobs.filter(({ status }) => status === "succeeded").forEach(rememberLoras);
        announce(`The grid has ended: ${drawnOf(run)}.`);
    });
    focusOn(".grid-cancel");
}

/** Show the picture of a cell in the stage, among the others. */
function openCell(picture) {
    if (!state.pictures.includes(picture)) {
        state.pictures = [picture, ...state.pictures];
        keep([picture]);
    }
    change(state, { selected: picture.id, compare: null, picking: false, tab: "picture" });
}

async function exportPng({ x, y, title, rows }) {
    const names = ({ axis, texts }) => ({ label: axis.label, texts });
    const cells = rows.map((row) => row.map((job) => job.pictures[0]?.blob ?? reasonOf(job)));
    let blob;
    try {
        blob = await gridPicture({ title, x: names(x), y: names(y), cells });
    } catch {
        return note("This browser cannot read one of these pictures, so it can make none of the grid.");
    }
    if (blob === null) return note("This browser has no room for a picture of this grid.");
    download(blob, `grid-${x.axis.id}-${y.axis.id}`.replace(/[^\w.-]+/g, "-") + ".png");
}

// The views

function sideView(side, legend, sides) {
    const { axis, text, problem } = sides[side];
    const other = sides[side === "x" ? "y" : "x"].axis;
    const choices = sides.all.filter((choice) => areApart(choice, other));
    const choose = ({ target }) => {
        change(grid, { asking: false, chosen: { x: sides.x.axis.id, y: sides.y.axis.id, [side]: target.value } });
    };
    const optionView = ({ id, label }) => html`<option value=${id} .selected=${id === axis.id}>${label}</option>`;
    return html`
        <fieldset class="stack grid-side">
            <legend class="field-label">${legend}</legend>
            <div class="field">
                <label class="visually-hidden" for="grid-${side}">Input of the ${legend.toLowerCase()}</label>
                <select id="grid-${side}" @change=${choose}>
                    ${choices.map(optionView)}
                </select>
            </div>
            <div class="field">
                <label for="grid-${side}-values">Values of the ${legend.toLowerCase()}</label>
                ${valuesView(side, axis, text, problem)}
                <p class=${problem ? "problem" : "hint"} id="grid-${side}-hint">${problem ?? hintOf(axis)}</p>
            </div>
        </fieldset>
    `;
}

function valuesView(side, { id, field }, text, problem) {
    const type = ({ target }) => change(grid, { asking: false, texts: { ...grid.texts, [id]: target.value } });
    return isWords(field)
        ? html`
              <textarea
                  id="grid-${side}-values"
                  rows="3"
                  .value=${text}
                  aria-invalid=${problem !== null}
                  aria-describedby="grid-${side}-hint"
                  @input=${type}
              ></textarea>
          `
        : html`
              <input
                  id="grid-${side}-values"
                  type="text"
                  autocomplete="off"
                  .value=${text}
                  aria-invalid=${problem !== null}
                  aria-describedby="grid-${side}-hint"
                  @input=${type}
              />
          `;
}

function hintOf({ id, field }) {
    if (id === LORAS) return "One per line, such as zorp*0.8; each takes the place of all that the form has.";
    if (isWords(field)) return "One per line.";
    if (field.enum || field.type === "boolean") return "Separated by commas.";
    if (field.type === "integer") return "Separated by commas; 1-4 is 1, 2, 3, 4.";
    return "Separated by commas, so decimals have a point; 0:1:0.25 goes from 0 to 1 by 0.25.";
}

/** The button that begins, or the question whether so many pictures shall be drawn. */
function startView(sides) {
    const count = countCells(sides);
    const problem = gridProblem(sides);
    const startButton = (text) => html`
        <button class="button primary grid-start" type="submit" ?disabled=${!canStart(sides)}>${text}</button>
    `;
    if (grid.asking) {
        return html`
            <div class="row grid-ask" role="group" aria-label="Many pictures">
                <span>These are ${count} pictures.</span>
                ${startButton(`Draw ${count} pictures`)}
                <button class="button" type="button" @click=${() => ask(false)}>Do not draw</button>
            </div>
        `;
    }
    return html`
        <div class="row">
            ${startButton("Draw grid")}
            <span class="quiet">${count > 0 ? `${count} picture${count === 1 ? "" : "s"}` : nothing}</span>
            ${problem ? html`<span class="problem">${problem}</span>` : nothing}
        </div>
    `;
}

function runView(run) {
    const jobs = run.rows.flat();
    const drawn = jobs.some(({ pictures }) => pictures.length > 0);
    const cancel = () => {
        cancelJobs(jobs);
        focusOn(".grid-start"); // the button goes
    };
    const cancelButton = html`<button class="button grid-cancel" @click=${cancel}>Cancel grid</button>`;
    const count = jobs.filter(hasEnded).length;
    const ended = html`<progress aria-label="Cells that have ended" max=${jobs.length} .value=${count}></progress>`;
    return html`
        <section class="stack" aria-label="Grid">
            <div class="row grid-bar">
                <h2>${run.title}</h2>
                <span class="quiet">${drawnOf(run)}</span>
                ${isRunning() ? cancelButton : nothing}
                <button class="button" ?disabled=${!drawn} @click=${() => exportPng(run)}>Export PNG</button>
            </div>
            ${isRunning() ? ended : nothing}
            <div class="grid-scroll" tabindex="0" role="region" aria-label="Cells">${tableView(run)}</div>
        </section>
    `;
}

function drawnOf({ rows }) {
    const jobs = rows.flat();
    return `${jobs.filter(({ pictures }) => pictures.length > 0).length} of ${jobs.length} drawn`;
}

function tableView({ x, y, rows }) {
    const cellText = ({ axis, texts }, index) => `${axis.label} ${texts[index]}`;
    const rowView = (row, number) => html`
        <tr>
            <th scope="row">${y.texts[number]}</th>
            ${row.map((job, column) => cellView(job, `${cellText(x, column)}, ${cellText(y, number)}`))}
        </tr>
    `;
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
                ${rows.map(rowView)}
            </tbody>
        </table>
    `;
}

function cellView(job, name) {
    const [picture] = job.pictures;
    if (picture === undefined) {
        return html`<td><div class="grid-empty" data-status=${job.status}>${reasonOf(job)}</div></td>`;
    }
    return html`
        <td>
            <button class="grid-open" title="Open" @click=${() => openCell(picture)}>
                <img src=${urlOf(picture.blob)} alt=${name} />
            </button>
        </td>
    `;
}

/** The text of a cell while it has no picture. */
function reasonOf({ status, error, at, of }) {
    if (status === "failed") return error.startsWith("NSFW") ? "Kept back by the safety check." : error;
    if (status === "drawing") return of === null ? "Drawing" : `Step ${at} of ${of}`;
    return { queued: "Queued", waiting: error ?? "Waiting", canceled: "Cancelled", succeeded: "No picture" }[status];
}

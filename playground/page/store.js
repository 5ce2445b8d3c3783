/**
 * The state of the page, in one object. Code that changes it calls `changed`, which renders the page anew.
 * This module knows neither HTTP nor the document.
 */

/** Milliseconds since the epoch, by a clock that setting the computer's time does not move, so that countdowns end. */
export const now = () => performance.timeOrigin + performance.now();

/** @typedef {{path: string, scale: number, file: File|null}} Lora */
/** @typedef {{inputs: Object<string, *>, loras: Lora[]}} Recipe what a person asks for; values may be a File */

/**
 * @typedef {object} Job one prediction, from the moment it is asked for; moments are in ms since the epoch, by `now`
 * @property {string} id of the prediction
 * @property {Recipe} recipe
 * @property {"draw"|"cell"} kind a drawing of the form, or a cell of a grid
 * @property {"queued"|"waiting"|"drawing"|"succeeded"|"failed"|"canceled"} status waiting: the server has no room yet
 * @property {number|null} at steps that are done, once the server has told them
 * @property {number|null} of steps in all
 * @property {string} log what the predictor has printed
 * @property {string|null} error the sentence on why it waits, failed or was cancelled
 * @property {Object<string, string>} problems by input, what the server said of it
 * @property {number|null} until when it is asked for again, where the server said when
 * @property {number|null} startedAt when the server began with it
 * @property {number|null} endedAt
 * @property {object|null} answer as JSON, its data URIs cut
 * @property {Picture[]} pictures
 * @property {AbortController} abort breaks its requests off
 * @property {Promise<Job>} done resolves to the job itself once it has ended, however it does
 * @property {function(Job): void} resolve of that promise
 */

/**
 * @typedef {object} Picture
 * @property {string} id the job's, and its place among the job's pictures
 * @property {Blob} blob its bytes as they came
 * @property {string} name of its file, such as "flux-7.webp"
 * @property {number|null} seed null where the server does not tell it
 * @property {Recipe} recipe that draws it alone, without secrets
 * @property {{path: string, scale: number, name: string}[]} loras as the server tells of them
 * @property {{seed: number|null, seeds: (number|null)[], safety: {dropped: number[]}, predict_time: number|null}}
 *     metrics of its job: all pictures' seeds, the places of those that were kept back, seconds; and what else is told
 * @property {number} at when it came, in ms since the epoch
 */

export const state = {
    about: null, // what about.json said of the server
    connection: { kind: "connecting", sentence: "", log: "", since: now(), until: null },
    schema: null, // {fields, groups}, of schema.js
    library: [], // names of LoRAs
    inputs: {}, // what the form says where it differs from the defaults
    loras: [],
    problems: {}, // by input, what the server said of it
    seedLocked: false,
    jobs: [], // the newest last
    pictures: [], // the newest first
    selected: null, // the id of a picture
    compare: null, // the id of the picture beside it
    tab: "picture",
    notes: [], // sentences that stay until they are dismissed
    said: "", // what a screen reader is told
};

let listener = () => {};
let scheduled = false;

/** Call `render` after changes, once for all that are made in one turn. */
export function onChange(render) {
    listener = render;
}

/** Have the page rendered anew. */
export function changed() {
    if (scheduled) return;
    scheduled = true;
    queueMicrotask(() => {
        scheduled = false;
        listener();
    });
}

/** Have a screen reader say a sentence. */
export function announce(sentence) {
    // A screen reader says only what changes, so the same sentence again gets a blank.
    state.said = state.said === sentence ? `${sentence}\u00a0` : sentence;
    changed();
}

/** Show a sentence until it is dismissed. */
export function note(sentence) {
    if (!state.notes.includes(sentence)) state.notes.push(sentence);
    announce(sentence);
}

/** @returns {Picture|null} the one that the stage shows: the selected one, else the newest. */
export function selectedPicture() {
    return state.pictures.find(({ id }) => id === state.selected) ?? state.pictures[0] ?? null;
}

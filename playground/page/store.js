/**
 * The state of the page, in one object. Code that changes it calls `change` or `changed`, which render the page anew.
 * This module knows neither HTTP nor the document.
 */

/** Milliseconds since the epoch, by a clock that setting the computer's time does not move, so that countdowns end. */
export const now = () => performance.timeOrigin + performance.now();

/** @typedef {{path: string, scale: number, file: File|null}} Lora */
/** @typedef {{inputs: Object<string, *>, loras: Lora[]}} Recipe what a person asks for; values may be a File */
// A Job is made in `enqueue` of jobs.js, a Picture in `picturesOf` there, a Field in `readField` of schema.js.

export const state = {
    about: null, // about.json: {server, progress, address, tokens, log}
    connection: { kind: "connecting", sentence: "", log: "", since: now(), until: null },
    schema: null, // {fields, groups}, of schema.js; once it is read, the page has its form and its tabs
    library: [], // names of LoRAs
    inputs: {}, // what the form says where it differs from the defaults
    loras: [],
    typedLora: "", // in the field that adds a LoRA
    problems: {}, // by input, the sentence on what is wrong with it
    seedLocked: false,
    jobs: [], // the newest last
    pictures: [], // the newest first
    selected: null, // the id of a picture
    compare: null, // the id of the picture beside it
    picking: false, // whether the next picture that is chosen is compared with the selected one
    tab: "picture",
    notes: [], // sentences that stay until they are dismissed
    said: "", // what a screen reader is told
};

let listener = () => {};
let scheduled = false;

/** Call `render` after changes. */
export function onChange(render) {
    listener = render;
}

/** Set properties of the state or of a part of it, such as a job, and have the page rendered anew. */
export function change(target, values) {
    Object.assign(target, values);
    changed();
}

/** Have the page rendered anew, once for all changes of one turn. */
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
    change(state, { said: state.said === sentence ? `${sentence}\u00a0` : sentence });
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

/** @returns {Picture|undefined} the one beside the selected picture. */
export const comparedPicture = () => state.pictures.find(({ id }) => id === state.compare);

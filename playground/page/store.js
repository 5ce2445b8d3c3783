/**
 * What the page knows, in one object. Whoever changes it calls `changed`, and the page is rendered anew.
 * This module knows neither HTTP nor the document.
 */

/** Milliseconds since the epoch, by a clock that nobody sets: a countdown would not end where one is turned back. */
export const now = () => performance.timeOrigin + performance.now();

/** @typedef {{path: string, scale: number, file: File|null}} Lora */
/** @typedef {{inputs: Object<string, *>, loras: Lora[]}} Recipe what a person asks for; values may be a File */

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

/** Tell a screen reader. */
export function announce(sentence) {
    // The same text again would be no change, and nobody would hear it.
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

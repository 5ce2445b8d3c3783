/**
 * The pictures that were drawn, whole, in this browser's IndexedDB: their bytes, and the files they were drawn from.
 *
 * A file is kept once, however many pictures were drawn from it: one LoRA for two hundred pictures would fill the disk.
 * So a picture's record names its files by keys, and a file goes with the last picture that names it.
 * Where the browser keeps nothing (a private window, a full disk), the page goes on with what it has in memory.
 */

import { note, state } from "./store.js";

/** So many pictures are kept; the oldest go. */
export const MOST = 200;

const NAME = "flux-sprites";
const PICTURES = "pictures";
const FILES = "files";
const keys = new WeakMap(); // of files that have been given one

let database = null; // a promise, from the first use on
let told = false; // that nothing is kept

/** @returns {Promise<Picture[]>} those kept, the newest first; what cannot be read is left out. */
export function load() {
    return attempt([], async () => {
        const [records, files] = await transact("readonly", (...stores) => Promise.all(stores.map(readable)));
        const pictures = [...records.values()].map((record) => revived(record, files)).filter((it) => it !== null);
        const whole = await Promise.all(pictures.map(({ blob }) => hasBytes(blob)));
        return pictures.filter((_, index) => whole[index]).sort((one, other) => other.at - one.at);
    });
}

/**
 * Keep pictures, and let the oldest go where there are too many, on the page too.
 *
 * @param {Picture[]} pictures
 */
export function keep(pictures) {
    state.pictures.splice(MOST);
    return attempt(undefined, () =>
        transact("readwrite", async (records, files) => {
            for (const picture of pictures) {
                const named = new Map();
                const recipe = withFiles(picture.recipe, (value) => {
                    if (!(value instanceof Blob)) return value;
                    named.set(keyOf(value), value);
                    return { key: keyOf(value) };
                });
                for (const [key, file] of named) {
                    if ((await done(files.getKey(key))) === undefined) await done(files.put(file, key));
                }
                await done(records.put({ ...picture, recipe, files: [...named.keys()] }));
            }
            const oldest = (await done(records.index("at").getAllKeys())).slice(0, -MOST);
            await remove(oldest, records, files);
        }),
    );
}

/**
 * Keep a picture no longer.
 *
 * @param {string} id
 */
export function forget(id) {
    return attempt(undefined, () => transact("readwrite", (...stores) => remove([id], ...stores)));
}

/** Keep none of them any longer. */
export function clear() {
    return attempt(undefined, () =>
        transact("readwrite", (...stores) => Promise.all(stores.map((store) => done(store.clear())))),
    );
}

/** What `work` resolves to; where the browser refuses, `instead`, and the person is told once. */
async function attempt(instead, work) {
    try {
        return await work();
    } catch {
        if (!told) note("This browser keeps no pictures here now: they are gone when the page is closed.");
        told = true;
        return instead;
    }
}

/** Work on both stores in one transaction; resolves once it is written, as a full disk may show only then. */
async function transact(mode, work) {
    database ??= open().catch((error) => {
        database = null; // it may be opened the next time
        throw error;
    });
    const transaction = (await database).transaction([PICTURES, FILES], mode);
    const written = new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
    });
    const stores = [PICTURES, FILES].map((name) => transaction.objectStore(name));
    const [result] = await Promise.all([work(...stores), written]);
    return result;
}

async function open() {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
        const pictures = request.result.createObjectStore(PICTURES, { keyPath: "id" });
        pictures.createIndex("at", "at");
        pictures.createIndex("files", "files", { multiEntry: true });
        request.result.createObjectStore(FILES);
    };
    const opened = await done(request);
    // A newer page in another tab need not wait for this one; what has been deleted is made anew when it is needed.
    opened.onversionchange = opened.onclose = () => {
        opened.close();
        database = null;
    };
    return opened;
}

/** What a request of IndexedDB answers. One that fails does not undo the rest of its transaction. */
function done(request) {
    return new Promise((resolve, reject) => {
        request.onsuccess = () => resolve(request.result);
        request.onerror = (event) => {
            event.preventDefault();
            reject(request.error);
        };
    });
}

/** What of a store can be read, by key. One by one: a single damaged record would fail a question for all of them. */
async function readable(store) {
    const read = async (key) => [key, await done(store.get(key)).catch(() => null)];
    return new Map(await Promise.all((await done(store.getAllKeys())).map(read)));
}

/** Delete records, and the files that no other record names. */
async function remove(ids, records, files) {
    if (ids.length === 0) return;
    await Promise.all(ids.map((id) => done(records.delete(id))));
    for (const key of await done(files.getAllKeys())) {
        if ((await done(records.index("files").count(key))) === 0) await done(files.delete(key));
    }
}

/** @returns {Picture|null} of its record; null where it is none that this page knows, or a file of it is missing. */
function revived(record, files) {
    if (!isRecord(record) || !record.files.every((key) => files.get(key) instanceof Blob)) return null;
    const { files: named, ...picture } = record;
    for (const key of named) keys.set(files.get(key), key);
    return { ...picture, recipe: withFiles(record.recipe, (value) => files.get(value?.key) ?? value) };
}

function isRecord(record) {
    const lists = [record?.files, record?.loras, record?.recipe?.loras];
    const objects = [record?.metrics, record?.recipe?.inputs];
    return (
        record?.blob instanceof Blob &&
        typeof record.at === "number" &&
        lists.every(Array.isArray) &&
        objects.every((it) => typeof it === "object" && it !== null)
    );
}

/** Whether its bytes are still there: a browser may have lost them, and says so only when they are read. */
async function hasBytes(blob) {
    try {
        return (await blob.slice(0, 1).arrayBuffer()).byteLength === 1;
    } catch {
        return false;
    }
}

/** The recipe with each value, and each file of a LoRA, replaced by what `replace` makes of it. */
function withFiles({ inputs, loras }, replace) {
    return {
        inputs: Object.fromEntries(Object.entries(inputs).map(([name, value]) => [name, replace(value)])),
        loras: loras.map((lora) => ({ ...lora, file: replace(lora.file) })),
    };
}

function keyOf(file) {
    if (!keys.has(file)) keys.set(file, crypto.getRandomValues(new Uint32Array(4)).join("-"));
    return keys.get(file);
}

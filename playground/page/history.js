/**
 * Keeps the pictures that were drawn in this browser's IndexedDB: their bytes, and the files they were drawn from.
 *
 * A file is stored once, as two hundred copies of one LoRA would fill the disk. A picture's record names its files by
 * keys, and a file is deleted with the last picture that names it.
 * Where the browser stores nothing (a private window, a full disk), the page goes on with what it has in memory.
 */

import { note, state } from "./store.js";

export const MOST = 200; // pictures that are kept

const NAME = "flux-sprites";
const PICTURES = "pictures";
const FILES = "files";
const keys = new WeakMap(); // of files that have been given one

let database = null; // a promise, from the first use on
let isNoted = false; // that nothing is kept

/** @returns {Promise<Picture[]>} those kept, the newest first, without those that cannot be read. */
export function load() {
    return attempt([], async () => {
        const [records, files] = await transact("readonly", (...stores) => Promise.all(stores.map(readable)));
        const pictures = [...records.values()].map((record) => revived(record, files)).filter((it) => it !== null);
        const whole = await Promise.all(pictures.map(({ blob }) => hasBytes(blob)));
        return pictures.filter((_, index) => whole[index]).sort((one, other) => other.at - one.at);
    });
}

/** Keep pictures; of more than `MOST`, delete the oldest, on the page too. */
export function keep(pictures) {
    state.pictures.splice(MOST);
    return write(async (records, files) => {
        for (const picture of pictures) {
            const named = new Map();
            const recipe = withFiles(picture.recipe, (value) => {
                if (!(value instanceof Blob)) return value;
                named.set(keyOf(value), value);
                return { key: keyOf(value) };
            });
            for (const [key, file] of named) {
                if ((await resultOf(files.getKey(key))) === undefined) await resultOf(files.put(file, key));
            }
            await resultOf(records.put({ ...picture, recipe, files: [...named.keys()] }));
        }
        const oldest = (await resultOf(records.index("at").getAllKeys())).slice(0, -MOST);
        await remove(oldest, records, files);
    });
}

export const forget = (id) => write((...stores) => remove([id], ...stores));
export const clear = () => write((...stores) => Promise.all(stores.map((store) => resultOf(store.clear()))));
const write = (work) => attempt(undefined, () => transact("readwrite", work));

/** The result of `work`; if the browser refuses, `instead`, and a note says so once. */
async function attempt(instead, work) {
    try {
        return await work();
    } catch {
        if (!isNoted) note("This browser keeps no pictures here now: they are gone when the page is closed.");
        isNoted = true;
        return instead;
    }
}

/** The result of `work` on both stores in one transaction, once that is written: a full disk may show only then. */
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
    const opened = await resultOf(request);
    // Close it when a newer page in another tab upgrades it, or when it is deleted; the next use opens it again.
    opened.onversionchange = opened.onclose = () => {
        opened.close();
        database = null;
    };
    return opened;
}

/** The result of a request to IndexedDB. One that fails does not undo the rest of its transaction. */
function resultOf(request) {
    return new Promise((resolve, reject) => {
        request.onsuccess = () => resolve(request.result);
        request.onerror = (event) => {
            event.preventDefault();
            reject(request.error);
        };
    });
}

/** The entries of a store by key, null for those that cannot be read. One by one: one such would fail `getAll`. */
async function readable(store) {
    const read = async (key) => [key, await resultOf(store.get(key)).catch(() => null)];
    return new Map(await Promise.all((await resultOf(store.getAllKeys())).map(read)));
}

/** Delete records, and the files that no other record names. */
async function remove(ids, records, files) {
    if (ids.length === 0) return;
    await Promise.all(ids.map((id) => resultOf(records.delete(id))));
    for (const key of await resultOf(files.getAllKeys())) {
        if ((await resultOf(records.index("files").count(key))) === 0) await resultOf(files.delete(key));
    }
}

/** @returns {Picture|null} of its record; null where that has another form, or a file of it is missing. */
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

/** Whether a Blob's bytes are still there: a browser that has lost them says so only when they are read. */
async function hasBytes(blob) {
    const first = await blob.slice(0, 1).arrayBuffer().catch(() => null);
    return first?.byteLength === 1;
}

/** The recipe with each value, and each file of a LoRA, passed through `replace`. */
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

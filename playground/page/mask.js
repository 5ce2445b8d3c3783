/**
 * A dialog in which a mask is painted over an image: white is drawn anew, black is kept.
 *
 * A mask is one byte for each pixel. A stroke raises it to the brush's strength there, or lowers it where it erases, so
 * a soft brush that passes twice gets no harder. Bytes rather than a canvas: undo restores them to the bit, in every
 * browser.
 */

import { COMMAND, radioView, slider } from "./browser.js";
import { html, nothing, render } from "./vendor/lit-html.js";

const LONGEST_SIDE = 1440; // the predictor draws no larger, and scales masks down to that
const TRACE = 8; // up to here a grey counts as black for the predictor
const UNDO_BYTES = 64 * 2 ** 20; // thirty changes of whole masks of the largest size
const LARGER = 1.25; // by which a key changes the size of the brush
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const COMMAND_KEY = COMMAND === "⌘" ? "Meta" : "Control"; // its name for screen readers
const KEYBOARD = "keyboard"; // in place of a pointer's id
const HINT = "What is painted is drawn anew; all else is kept.";
const NOTHING = "Nothing is painted yet: paint over what is to be drawn anew.";
const MISFIT = "The mask that was chosen does not fit this image, so this one starts empty.";

/**
 * The mask that a person paints over an image, going on with `mask` if that is not null. It throws where the browser
 * cannot read the image.
 *
 * @returns {Promise<File|null>} "mask.png" in greys, of the image's aspect, no side longer than 1440; null: cancelled
 */
export async function paintMask(image, mask) {
    const picture = await canvasOf(image);
    const { width, height } = picture;
    const bytes = mask && (await greysOf(mask, picture));
    const dialog = document.createElement("dialog");
    const easel = {
        dialog,
        picture,
        surface: null, // the canvas over the picture, on which the mask is seen
        raster: { width, height, bytes: bytes ?? new Uint8Array(width * height) }, // row by row, 0 (kept) to 255
        brush: { size: Math.ceil(Math.max(width, height) / 10), hardness: 0.8, erases: false }, // size: in pixels
        cursor: { x: width / 2, y: height / 2 },
        stroke: null, // {pointer, before, area}: the pointer's id, the bytes when it began, and the area it changed
        done: [], // pieces {area, bytes} that undo, the newest last
        undone: [], // pieces that do again
        problem: mask && !bytes ? MISFIT : "",
    };
    dialog.className = "mask-dialog";
    dialog.setAttribute("aria-labelledby", "mask-title");
    dialog.addEventListener("keydown", (event) => onKey(easel, event));
    document.body.append(dialog);
    update(easel);
    easel.surface = dialog.querySelector(".mask-surface");
    tint(easel, wholeOf(picture));
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    dialog.remove();
    return dialog.returnValue === "use" ? pngOf(easel.raster) : null;
}

// Files and pixels

/** A picture on white, as the predictor sees it, at the size that is drawn. */
async function canvasOf(blob) {
    const bitmap = await createImageBitmap(blob);
    const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
    const size = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
    return laid(bitmap, size, "white");
}

/** A bitmap on a canvas of another size and colour. */
function laid(bitmap, [width, height], colour) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { alpha: false });
    context.fillStyle = colour;
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    bitmap.close();
    return canvas;
}

/** The greys of a mask, [height × width], transparency as black; null if it is unreadable or of another aspect. */
async function greysOf(blob, { width, height }) {
    // The mask's numbers count, without its colour profile.
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" }).catch(() => null);
    if (bitmap === null) return null;
    const longest = Math.max(width, height, bitmap.width, bitmap.height); // sides may have been rounded by a pixel
    if (Math.abs(bitmap.width * height - bitmap.height * width) > longest) return null;
    const { data } = laid(bitmap, [width, height], "black").getContext("2d").getImageData(0, 0, width, height);
    const luminance = (at) => (19595 * data[at] + 38470 * data[at + 1] + 7471 * data[at + 2] + 32768) >> 16;
    return new Uint8Array(width * height).map((_, at) => luminance(4 * at));
}

async function pngOf({ width, height, bytes }) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { alpha: false });
    const pixels = context.createImageData(width, height);
    bytes.forEach((value, at) => pixels.data.fill(value, 4 * at, 4 * at + 3).fill(255, 4 * at + 3, 4 * at + 4));
    context.putImageData(pixels, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    return new File([blob], "mask.png", { type: "image/png" });
}

// The raster

/**
 * Draw a straight piece of a stroke, or a dot: each pixel gets what the brush says at its distance from the line.
 *
 * @returns {{x: number, y: number, width: number, height: number}|null} the area whose pixels may have changed; null:
 *     all of the line lies outside
 */
function drawLine({ width, height, bytes }, from, to, { size, hardness, erases }) {
    const reach = size / 2 + 0.5; // half a pixel more, as the edge of a hard brush is smooth for one
    const soft = Math.max(1, (size / 2) * (1 - hardness)); // pixels from white to black
    const core = Math.max(0, reach - soft) ** 2; // up to this distance all is white; squared, as all distances here
    const left = Math.max(0, Math.floor(Math.min(from.x, to.x) - reach));
    const top = Math.max(0, Math.floor(Math.min(from.y, to.y) - reach));
    const right = Math.min(width, Math.ceil(Math.max(from.x, to.x) + reach));
    const bottom = Math.min(height, Math.ceil(Math.max(from.y, to.y) + reach));
    if (left >= right || top >= bottom) return null;
    const wide = to.x - from.x;
    const high = to.y - from.y;
    const length = wide ** 2 + high ** 2 || 1; // of a dot, any will do
    for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) {
            const over = x + 0.5 - from.x;
            const down = y + 0.5 - from.y;
            const along = Math.min(1, Math.max(0, (over * wide + down * high) / length));
            const distance = (over - along * wide) ** 2 + (down - along * high) ** 2;
            if (distance >= reach ** 2) continue;
            const strength = distance <= core ? 255 : Math.round(255 * smooth((reach - Math.sqrt(distance)) / soft));
            const at = y * width + x;
            bytes[at] = erases ? Math.min(bytes[at], 255 - strength) : Math.max(bytes[at], strength);
        }
    }
    return { x: left, y: top, width: right - left, height: bottom - top };
}

/** 0 to 1 without a corner at either end. */
const smooth = (share) => share * share * (3 - 2 * share);

const wholeOf = ({ width, height }) => ({ x: 0, y: 0, width, height });

/** The smallest area that holds two. */
function around(one, other) {
    const x = Math.min(one.x, other.x);
    const y = Math.min(one.y, other.y);
    const right = Math.max(one.x + one.width, other.x + other.width);
    const bottom = Math.max(one.y + one.height, other.y + other.height);
    return { x, y, width: right - x, height: bottom - y };
}

/** The places in a raster at which the rows of an area begin. */
const rowsOf = (area, width) => Array.from({ length: area.height }, (_, row) => (area.y + row) * width + area.x);

/** A copy of an area. */
function cut({ width, bytes }, area) {
    const copy = new Uint8Array(area.width * area.height);
    rowsOf(area, width).forEach((start, row) => copy.set(bytes.subarray(start, start + area.width), row * area.width));
    return { area, bytes: copy };
}

// Actions

function begin(easel, pointer, point) {
    easel.stroke = { pointer, before: easel.raster.bytes.slice(), area: null };
    easel.problem = "";
    easel.cursor = point;
    move(easel, [point]);
}

/** Move the brush through points; while there is a stroke, it draws. */
function move(easel, points) {
    const { raster, brush, stroke } = easel;
    for (const point of points) {
        const area = stroke && drawLine(raster, easel.cursor, point, brush);
        easel.cursor = point;
        if (!area) continue;
        stroke.area = stroke.area ? around(stroke.area, area) : area;
        tint(easel, area);
    }
    update(easel);
}

function end(easel, pointer) {
    const { stroke } = easel;
    if (stroke?.pointer !== pointer) return;
    if (stroke.area) remember(easel, stroke.area, stroke.before);
    easel.stroke = null;
    update(easel);
}

/** Keep the bytes of an area from before it changed; the oldest pieces go where there is no room. */
function remember({ raster, done, undone }, area, before) {
    undone.length = 0;
    done.push(cut({ ...raster, bytes: before }, area));
    let size = 0;
    done.splice(0, done.findLastIndex(({ bytes }) => (size += bytes.length) > UNDO_BYTES) + 1);
}

/** Undo (from `done` to `undone`), or do again (the other way round). */
function step(easel, from, to) {
    if (easel.stroke || from.length === 0) return;
    const { raster } = easel;
    const { area, bytes } = from.pop();
    to.push(cut(raster, area));
    rowsOf(area, raster.width).forEach((start, row) => {
        raster.bytes.set(bytes.subarray(row * area.width, (row + 1) * area.width), start);
    });
    tint(easel, area);
    update(easel);
}

function change(easel, byte) {
    if (easel.stroke) return;
    const before = easel.raster.bytes;
    easel.raster.bytes = before.map(byte);
    remember(easel, wholeOf(easel.raster), before);
    tint(easel, wholeOf(easel.raster));
    update(easel);
}

function choose(easel, changes) {
    Object.assign(easel.brush, changes);
    update(easel);
}

function accept(easel) {
    if (easel.raster.bytes.some((value) => value > TRACE)) return easel.dialog.close("use");
    easel.problem = NOTHING;
    update(easel);
}

/** Where a pointer is, in pixels of the mask. */
function placeOf({ surface, raster: { width, height } }, { clientX, clientY }) {
    const box = surface.getBoundingClientRect();
    return { x: ((clientX - box.left) / box.width) * width, y: ((clientY - box.top) / box.height) * height };
}

function onPointerDown(easel, event) {
    if (event.button !== 0 || easel.stroke) return;
    easel.surface.setPointerCapture(event.pointerId);
    begin(easel, event.pointerId, placeOf(easel, event));
}

function onPointerMove(easel, event) {
    if (easel.stroke && easel.stroke.pointer !== event.pointerId) return;
    const events = event.getCoalescedEvents?.() ?? []; // all places since the last frame
    move(easel, (events.length > 0 ? events : [event]).map((place) => placeOf(easel, place)));
}

/** Arrows move the brush by a quarter of its size, with Shift by a pixel; it draws while Space is down. */
function onSurfaceKey(easel, event) {
    const { cursor, brush, raster, stroke } = easel;
    if (event.key === " ") {
        if (!stroke) begin(easel, KEYBOARD, cursor);
    } else if (event.key in ARROWS) {
        const far = event.shiftKey ? 1 : Math.max(1, brush.size / 4);
        const [x, y] = ARROWS[event.key].map((direction) => direction * far);
        const within = (place, side) => Math.min(side, Math.max(0, place));
        move(easel, [{ x: within(cursor.x + x, raster.width), y: within(cursor.y + y, raster.height) }]);
    } else return;
    event.preventDefault();
}

function onKey(easel, event) {
    event.stopPropagation(); // the page's own keys rest
    const { brush, done, undone } = easel;
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (key === "[") choose(easel, { size: Math.max(1, Math.floor(brush.size / LARGER)) });
    else if (key === "]") choose(easel, { size: Math.min(largestBrush(easel), Math.ceil(brush.size * LARGER)) });
    else if (key === "x" && !command) choose(easel, { erases: !brush.erases });
    else if (key === "z" && command && !event.shiftKey) step(easel, done, undone);
    else if ((key === "z" || key === "y") && command) step(easel, undone, done);
    else return;
    event.preventDefault();
}

const largestBrush = ({ raster }) => Math.max(raster.width, raster.height);

// Views

const update = (easel) => render(view(easel), easel.dialog);

/** Show an area of the mask in the surface's colour, as opaque as it is white. */
function tint({ raster, surface }, area) {
    const context = surface.getContext("2d");
    const pixels = context.createImageData(area.width, area.height);
    cut(raster, area).bytes.forEach((value, at) => (pixels.data[4 * at + 3] = value));
    context.putImageData(pixels, area.x, area.y);
    context.save();
    context.beginPath();
    context.rect(area.x, area.y, area.width, area.height);
    context.clip();
    context.globalCompositeOperation = "source-in"; // the colour, where there is something
    context.fillStyle = getComputedStyle(surface).color;
    context.fill();
    context.restore();
}

function view(easel) {
    const { dialog, picture, problem, cursor, brush } = easel;
    const { width, height } = picture;
    const percent = (part, whole) => `${(part / whole) * 100}%`;
    const place = `--mask-x: ${percent(cursor.x, width)}; --mask-y: ${percent(cursor.y, height)}`;
    const style = `--mask-aspect: ${width / height}; --mask-size: ${percent(brush.size, width)}; ${place}`;
    return html`
        <header class="mask-header">
            <h2 id="mask-title">Paint a mask</h2>
            <p class=${problem ? "problem" : "hint"} role="status">${problem || HINT}</p>
            <button class="button" @click=${() => dialog.close()}>Cancel</button>
            <button class="button primary" @click=${() => accept(easel)}>Use mask</button>
        </header>
        <div class="mask-stage">
            <div class="mask-picture" .style=${style}>
                ${picture}
                <canvas
                    class="mask-surface"
                    width=${width}
                    height=${height}
                    tabindex="0"
                    autofocus
                    role="application"
                    aria-label="Mask"
                    aria-describedby="mask-keys"
                    @pointerdown=${(event) => onPointerDown(easel, event)}
                    @pointermove=${(event) => onPointerMove(easel, event)}
                    @lostpointercapture=${(event) => end(easel, event.pointerId)}
                    @keydown=${(event) => onSurfaceKey(easel, event)}
                    @keyup=${(event) => event.key === " " && end(easel, KEYBOARD)}
                    @blur=${() => end(easel, KEYBOARD)}
                ></canvas>
                <div class="mask-cursor"></div>
            </div>
        </div>
        ${toolsView(easel)}
    `;
}

function toolsView(easel) {
    const { brush, done, undone } = easel;
    const percent = Math.round(brush.hardness * 100);
    return html`
        <footer class="mask-tools">
            <fieldset class="segmented">
                <legend class="visually-hidden">What the brush does</legend>
                ${radioView("mask-mode", "Paint", !brush.erases, () => choose(easel, { erases: false }))}
                ${radioView("mask-mode", "Erase", brush.erases, () => choose(easel, { erases: true }))}
            </fieldset>
            ${sliderView("Brush size", brush.size, 1, largestBrush(easel), "px", (size) => choose(easel, { size }))}
            ${sliderView("Hardness", percent, 0, 100, "%", (share) => choose(easel, { hardness: share / 100 }))}
            <div class="row">
                ${buttonView("Undo", () => step(easel, done, undone), done.length > 0, `${COMMAND_KEY}+Z`)}
                ${buttonView("Redo", () => step(easel, undone, done), undone.length > 0, `${COMMAND_KEY}+Shift+Z`)}
                ${buttonView("Invert", () => change(easel, (value) => 255 - value))}
                ${buttonView("Clear", () => change(easel, () => 0))}
            </div>
            <p class="mask-keys hint" id="mask-keys">
                <kbd>[</kbd> and <kbd>]</kbd> change the size, <kbd>X</kbd> erases or paints,
                <kbd>${COMMAND} Z</kbd> undoes. Arrow keys move the brush, with Shift by a pixel; it paints while Space
                is down.
            </p>
        </footer>
    `;
}

function sliderView(label, value, minimum, maximum, unit, set) {
    const valueText = `${value} ${unit}`;
    return html`
        <label class="mask-slider">
            <span>${label} <span class="quiet">${valueText}</span></span>
            ${slider({ minimum, maximum, step: 1 }, { label, valueText, value, set })}
        </label>
    `;
}

/** A button that keeps the focus when there is nothing for it to do. */
function buttonView(label, act, isPossible = true, keys = nothing) {
    return html`
        <button class="button" aria-disabled=${!isPossible} aria-keyshortcuts=${keys} @click=${act}>${label}</button>
    `;
}

/** A grid as one picture: its cells at their full size, the names and values of its rows and columns, and a title. */

// The largest canvas that every browser has, in pixels.
const LARGEST_SIDE = 16_384;
const LARGEST_AREA = 64_000_000;

/**
 * Draw a grid: its title; the label and the texts of the columns, x, and of the rows, y; and its cells, each a picture
 * or a text that says why there is none. Pictures are copied pixel by pixel, unless the grid is larger than a canvas
 * may be. It throws where one is unreadable.
 *
 * @returns {Promise<Blob|null>} a PNG; null: the browser has no room for it
 */
export async function gridPicture(grid) {
    const canvas = document.createElement("canvas");
    const cell = await largestOf(grid.cells.flat().filter((content) => content instanceof Blob));
    const pen = penOf(canvas.getContext("2d"), Math.max(14, Math.round(cell.width / 28)));
    const { texts, x, y, whole } = layout(grid, cell, pen);
    const area = Math.sqrt(LARGEST_AREA / (whole.width * whole.height));
    const scale = Math.min(1, LARGEST_SIDE / whole.width, LARGEST_SIDE / whole.height, area);
    canvas.width = Math.floor(whole.width * scale);
    canvas.height = Math.floor(whole.height * scale);
    pen.begin(scale, whole);
    texts.forEach(pen.write);
    for (const [row, contents] of grid.cells.entries()) {
        for (const [column, content] of contents.entries()) {
            if (content instanceof Blob) await pen.copy(content, [x(column), y(row)]);
            else pen.frame(content, [x(column), y(row)], cell);
        }
    }
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** The width of the widest picture and the height of the highest. */
async function largestOf(blobs) {
    const largest = { width: 0, height: 0 };
    // One after the other: all of them at once may be more than a browser has room for.
    for (const blob of blobs) {
        const bitmap = await createImageBitmap(blob);
        for (const side of ["width", "height"]) largest[side] = Math.max(largest[side], bitmap[side]);
        bitmap.close();
    }
    return largest;
}

/** Functions that draw on a canvas in the page's own font and colours; `em` is the size of the letters. */
function penOf(context, em) {
    const { backgroundColor, color, fontFamily } = getComputedStyle(document.body);
    const line = Math.round(1.35 * em);
    const setFont = (bold) => (context.font = `${bold ? 600 : 400} ${em}px ${fontFamily}`);
    const measure = (text, bold = false) => {
        setFont(bold);
        return context.measureText(text).width;
    };
    const write = ({ lines, at: [left, top], bold = false }) => {
        setFont(bold);
        lines.forEach((text, index) => context.fillText(text, left, top + index * line));
    };
    const begin = (scale, { width, height }) => {
        context.scale(scale, scale);
        context.fillStyle = backgroundColor;
        context.fillRect(0, 0, width, height);
        Object.assign(context, { fillStyle: color, strokeStyle: color, textBaseline: "top" });
    };
    const copy = async (blob, [left, top]) => {
        const image = await createImageBitmap(blob);
        context.drawImage(image, left, top);
        image.close();
    };
    const frame = (text, [left, top], { width, height }) => {
        context.strokeRect(left + 0.5, top + 0.5, width - 1, height - 1);
        write({ lines: wrapped(text, width - 2 * em, height / line - 2, measure), at: [left + em, top + em] });
    };
    return { em, line, measure, begin, write, copy, frame };
}

/**
 * The places of everything, in whole pixels: between two pixels, pictures would be blurred.
 *
 * `x` gives the left of a column, `y` the top of a row, `whole` the size; each text has its lines and where they begin.
 */
function layout({ title, x: across, y: down }, cell, { em, line, measure }) {
    const gap = Math.round(em / 2);
    const bold = (text) => measure(text, true);
    const columns = across.texts.map((text) => wrapped(text, cell.width, 6, measure));
    const rows = down.texts.map((text) => wrapped(text, cell.width * 0.6, cell.height / line, measure));
    const corner = wrapped(down.label, cell.width * 0.6, 2, bold);
    const left = Math.ceil(Math.max(...rows.flat().map((text) => measure(text)), ...corner.map(bold))) + 2 * em;
    const x = (column) => left + column * (cell.width + gap);
    const width = x(columns.length) - gap + em;
    const heading = wrapped(title, width - 2 * em, 4, bold);
    const names = em + heading.length * line + gap;
    const values = names + line;
    const top = values + Math.max(corner.length, ...columns.map((lines) => lines.length)) * line + gap;
    const y = (row) => top + row * (cell.height + gap);
    const texts = [
        { lines: heading, at: [em, em], bold: true },
        { lines: wrapped(across.label, width - left - em, 1, bold), at: [left, names], bold: true },
        { lines: corner, at: [em, values], bold: true },
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

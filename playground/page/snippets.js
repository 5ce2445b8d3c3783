/** Programs that ask for one prediction, each of which runs as it stands. Pure: no page, no state. */

import { LORAS } from "./lora.js";
import { fieldNamed, isSecret, jsonText } from "./schema.js";
import { sent } from "./wire.js";

// References that mean the same within a sum of LoRAs as by themselves, and factors that one may have.
const PLAIN = /^[\w./:-]+$/;
const DECIMAL = /^-?\d{1,20}(\.\d{1,20})?$/;
const BARE = /^[\w@%+=:,./-]+$/; // words that mean themselves in a shell
const LARGEST_ARGUMENT = 2 ** 17 - 1; // bytes, on Linux

/** Programs that write the pictures of one prediction to files, `output.0.webp` and so on. */
export function snippets(recipe, about, { fields, ours }) {
    const parts = partsOf(recipe, about, fields);
    const options = predictOptions(parts, fields);
    const reason = ours ? whyNoCommand(options) : "script/predict draws with the project that it is part of alone.";
    return {
        curl: curl(parts), // for bash
        python: python(parts), // 3.11
        javascript: javascript(parts), // for Node 20
        predict: reason ? null : predict(options),
        reason, // the sentence on why there is no command for script/predict, or null
        files: [...parts.names], // those that lie beside the program, and their names
        variables: [...(about.tokens ? ["FLUX_TOKEN"] : []), ...parts.secrets.values()],
    };
}

/** The parts of every program. */
function partsOf(recipe, { address, tokens }, fields) {
    const inputs = sent(recipe.inputs, fields);
    const secrets = inputs.map(([name]) => name).filter((name) => isSecret(name, fields));
    const loras = fieldNamed(fields, LORAS) ? recipe.loras : [];
    return {
        url: `${address.replace(/\/$/, "")}/predictions`,
        tokens, // whether it sends the token in `FLUX_TOKEN`
        inputs, // names and values, of those that are sent
        secrets: new Map(secrets.map((name) => [name, name.toUpperCase()])), // by input, the variable with its value
        loras,
        names: fileNames([...inputs.map(([, value]) => value), ...loras.map(({ file }) => file)]),
    };
}

/** A name for each file among some values, no two of them alike. */
function fileNames(values) {
    const names = new Map();
    for (const file of new Set(values.filter((value) => value instanceof Blob))) {
        const own = file.name.replace(/^~/, "_"); // script/predict would read "~" as a home directory
        let name = own;
        for (let number = 2; [...names.values()].includes(name); number += 1) name = `${number}-${own}`;
        names.set(file, name);
    }
    return names;
}

const mediaType = (file) => file.type || "application/octet-stream";

// cURL

/** A program for bash. It sends a here-document, which unlike an argument may be as large as files are. */
function curl({ url, tokens, inputs, secrets, loras, names }) {
    const uri = (file) => `data:${mediaType(file)};base64,$(base64 <${quoted(names.get(file))} | tr -d '\\n')`;
    const text = (name, value) => {
        if (secrets.has(name)) return `"$${secrets.get(name)}"`;
        return value instanceof Blob ? `"${uri(value)}"` : plainJson(value);
    };
    const lines = inputs.map(([name, value]) => `"${name}": ${text(name, value)}`);
    if (loras.length > 0) {
        // JSON within JSON: its own quotes have a backslash.
        const items = loras.map(({ path, scale, file }) => {
            const written = plainJson(JSON.stringify({ path: file ? "" : path, scale })).slice(1, -1);
            return file ? written.replace('\\"\\"', () => `\\"${uri(file)}\\"`) : written;
        });
        lines.push(`"${LORAS}": "[${items.join(", ")}]"`);
    }
    const headers = ["Content-Type: application/json", ...(tokens ? ["Authorization: Bearer $FLUX_TOKEN"] : [])];
    return `curl -sS ${quoted(url)} \\
${headers.map((header) => `    -H "${header}" \\\n`).join("")}    --data-binary @- <<JSON >answer.json
{
  "input": {${lines.map((line) => `\n    ${line}`).join(",")}
  }
}
JSON
number=0
while IFS=';,' read -r kind _ picture; do
    base64 -d <<<"$picture" >"output.$number.\${kind#data:image/}"
    number=$((number + 1))
done < <(grep -o 'data:image/[a-z+.-]*;base64,[^"]*' answer.json)
[ $number -gt 0 ] || cat answer.json
`;
}

/**
 * JSON that a here-document leaves as it is: characters that mean something to a shell or a terminal are written as \u.
 * The backslashes that are left stand before a letter or a quote, where a shell keeps them.
 */
function plainJson(value) {
    return JSON.stringify(value).replace(/\\\\|[!$`\x7f-\x9f]/g, (found) => {
        return `\\u${found.charCodeAt(0).toString(16).padStart(4, "0")}`;
    });
}

// Python and JavaScript

function python({ url, tokens, inputs, secrets, loras, names }) {
    const literal = pythonLiteral;
    const uri = (file) => `data_uri(${literal(mediaType(file))}, ${literal(names.get(file))})`;
    const text = (name, value) => {
        if (secrets.has(name)) return `os.environ["${secrets.get(name)}"]`;
        return value instanceof Blob ? uri(value) : literal(value);
    };
    const lines = inputs.map(([name, value]) => `"${name}": ${text(name, value)},`);
    if (loras.length > 0) {
        const items = loras.map(({ path, scale, file }) => {
            return `        {"path": ${file ? uri(file) : literal(path)}, "scale": ${literal(scale)}},`;
        });
        lines.push(`"${LORAS}": json.dumps([\n${items.join("\n")}\n    ]),`);
    }
    const helper = `

def data_uri(kind: str, path: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"

`;
    const authorization = tokens ? `\n    "Authorization": f"Bearer {os.environ['FLUX_TOKEN']}",` : "";
    return `import base64
import json
${tokens || secrets.size > 0 ? "import os\n" : ""}import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
${names.size > 0 ? helper : ""}
inputs = {${lines.map((line) => `\n    ${line}`).join("")}
}
headers = {
    "Content-Type": "application/json",${authorization}
}
body = json.dumps({"input": inputs}).encode()
request = urllib.request.Request(${literal(url)}, body, headers)
try:
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
except urllib.error.HTTPError as error:
    sys.exit(f"{error.code}: {error.read().decode()}")
except urllib.error.URLError as error:
    sys.exit(f"There is no answer: {error.reason}")
if answer["status"] != "succeeded":
    sys.exit(answer.get("error") or answer["status"])
output = answer["output"]
for number, picture in enumerate(output if isinstance(output, list) else [output]):
    suffix, content = re.fullmatch(r"data:image/([\\w+.-]+);base64,(.*)", picture).groups()
    Path(f"output.{number}.{suffix}").write_bytes(base64.b64decode(content))
`;
}

/** A value of JSON as Python writes it. Texts and numbers are the same in both. */
function pythonLiteral(value) {
    if (value === null) return "None";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (typeof value !== "object") return JSON.stringify(value);
    if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
    const items = Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonLiteral(item)}`);
    return `{${items.join(", ")}}`;
}

function javascript({ url, tokens, inputs, secrets, loras, names }) {
    const literal = JSON.stringify;
    const uri = (file) => `await dataUri(${literal(mediaType(file))}, ${literal(names.get(file))})`;
    const text = (name, value) => {
        if (secrets.has(name)) return `process.env.${secrets.get(name)}`;
        return value instanceof Blob ? uri(value) : literal(value);
    };
    const lines = inputs.map(([name, value]) => `${name}: ${text(name, value)},`);
    if (loras.length > 0) {
        const items = loras.map(({ path, scale, file }) => {
            return `        { path: ${file ? uri(file) : literal(path)}, scale: ${literal(scale)} },`;
        });
        lines.push(`${LORAS}: JSON.stringify([\n${items.join("\n")}\n    ]),`);
    }
    const helper = `
async function dataUri(kind, path) {
    return \`data:\${kind};base64,\${(await readFile(path)).toString("base64")}\`;
}
`;
    const authorization = tokens ? "\n    Authorization: `Bearer ${process.env.FLUX_TOKEN}`," : "";
    return `import { ${names.size > 0 ? "readFile, " : ""}writeFile } from "node:fs/promises";
${names.size > 0 ? helper : ""}
const input = {${lines.map((line) => `\n    ${line}`).join("")}
};
const headers = {
    "Content-Type": "application/json",${authorization}
};
const body = JSON.stringify({ input });
const response = await fetch(${literal(url)}, { method: "POST", headers, body });
if (!response.ok) {
    console.error(\`\${response.status}: \${await response.text()}\`);
    process.exit(1);
}
const { status, error, output } = await response.json();
if (status !== "succeeded") {
    console.error(error ?? status);
    process.exit(1);
}
for (const [number, picture] of [output].flat().entries()) {
    const [, suffix, content] = /^data:image\\/([\\w+.-]+);base64,(.*)$/.exec(picture);
    await writeFile(\`output.\${number}.\${suffix}\`, Buffer.from(content, "base64"));
}
`;
}

// script/predict

function predict(options) {
    const words = ["script/predict", ...options.map(([name, text]) => `-i ${name}=${quoted(text)}`)];
    const line = words.join(" ");
    return `${line.length <= 100 ? line : words.join(" \\\n    ")}\n`;
}

/** The text for each input, in which @ names a file; null where LoRAs that are files have no place or strength. */
function predictOptions({ inputs, loras, names }, fields) {
    const at = (file) => `@${names.get(file)}`;
    const text = (value) => (value instanceof Blob ? at(value) : jsonText(value));
    const said = new Map(inputs.map(([name, value]) => [name, text(value)]));
    const files = loras.filter(({ file }) => file);
    const named = loras.filter(({ file }) => !file);
    const factor = Number(said.get("lora_scale") ?? 1);
    const { minimum, maximum } = fieldNamed(fields, "lora_scale") ?? {};
    if (named.length > 0) said.set(LORAS, sumOf(named));
    for (const { scale, file } of files) {
        const [input, strength] = said.has(LORAS) ? ["extra_lora", "extra_lora_scale"] : [LORAS, "lora_scale"];
        const product = Number((scale * factor).toPrecision(15));
        if (said.has(input) || product < minimum || product > maximum) return null;
        said.set(input, at(file)).set(strength, String(product));
        if (product === 1) said.delete(strength);
    }
    return [...said];
}

/** LoRAs as people write them, `zorp*0.8 + bold`; as JSON where a name or a number would be read otherwise there. */
function sumOf(loras) {
    if (!loras.every(({ path, scale }) => PLAIN.test(path) && DECIMAL.test(scale))) {
        return JSON.stringify(loras.map(({ path, scale }) => ({ path, scale })));
    }
    return loras.map(({ path, scale }) => (scale === 1 ? path : `${path}*${scale}`)).join(" + ");
}

/** Why there is no command for `script/predict`; null where there is one. */
function whyNoCommand(options) {
    if (options === null) {
        return (
            "script/predict takes a LoRA's file as replicate_weights or extra_lora alone, at that input's strength; " +
            "what the form says needs more than that, and the other tabs have it."
        );
    }
    for (const [name, text] of options) {
        const size = new TextEncoder().encode(`${name}=${text}`).length;
        if (size > LARGEST_ARGUMENT || /\0|\p{Surrogate}/u.test(text)) {
            const reason = size > LARGEST_ARGUMENT ? "it is longer than 128 KiB" : "a character of it is no text there";
            return `No command line takes this ${name}: ${reason}; the other tabs have it.`;
        }
    }
    return null;
}

/** A word of bash that means this text, whatever is in it. */
function quoted(text) {
    if (BARE.test(text)) return text;
    // A terminal would act on these when they are pasted; only here ! needs its code too, as history.
    if (/[\0-\x09\x0b-\x1f\x7f]/.test(text)) {
        const code = (character) => `\\x${character.charCodeAt(0).toString(16).padStart(2, "0")}`;
        return `$'${text.replace(/[\0-\x1f\x7f!'\\]/g, code)}'`;
    }
    return `'${text.replaceAll("'", "'\\''")}'`;
}

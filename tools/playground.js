"use strict";
// Draw what tools/playground.py answers or, in a file that --to wrote, engine.js. Text reaches the
// page only as text nodes and attribute values, never as HTML, so a prompt, a token or a file name
// can not add elements or scripts.

const PROJECT = "gpt2-from-scratch";
const byId = id => document.getElementById(id);

function element(space, tag, attributes = {}, ...children) {
    const node = document.createElementNS(`http://www.w3.org/${space}`, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
}
const html = (...parts) => element("1999/xhtml", ...parts);
const svg = (...parts) => element("2000/svg", ...parts);

function show(id, text, alert = false) {
    const message = byId(id);
    message.classList.toggle("alert", alert);
    if (message.textContent !== text) message.textContent = text;
}

function report(id, error) {
    const known = error instanceof UserError ? error.message : "";
    if (error.name !== "AbortError")  // otherwise the user asked for something else
        show(id, known || "The program does not answer. Is it still running?", true);
}

// Return a stream of the objects in the server's answer, one per line.
async function askServer(action, fields, signal) {
    const response = await fetch(action, {method: "POST", body: JSON.stringify(fields), signal});
    if (!response.ok) throw new UserError(`The program refused the request (${response.status}).`);
    let rest = "";
    const parse = new TransformStream({transform(chunk, controller) {
        const lines = (rest + chunk).split("\n");
        rest = lines.pop();
        for (const line of lines) controller.enqueue(JSON.parse(line));
    }});
    return response.body.pipeThrough(new TextDecoderStream()).pipeThrough(parse);
}

const isFile = byId("weights") !== null;  // --to wrote this page, and the model is inside it
const source = new Blob([byId("engine").textContent], {type: "text/javascript"});
const worker = isFile ? new Worker(URL.createObjectURL(source)) : null;
const inside = id => byId(id).textContent;
worker?.postMessage({model: inside("model"), weights: inside("weights")});
byId("weights")?.remove();  // the worker has a copy

// Return a stream of the engine's answers.
function askEngine(action, fields, signal) {
    const {port1, port2} = new MessageChannel();
    worker.postMessage({action, fields, port: port2}, [port2]);
    return new ReadableStream({start(controller) {
        port1.onmessage = ({data}) => data ? controller.enqueue(data) : controller.close();
        signal?.addEventListener("abort", () => {
            port1.onmessage = null;
            port1.postMessage("end");
            controller.error(signal.reason);
        });
    }});
}

// Yield the answers to a request as they arrive.
async function* ask(action, fields, signal) {
    const stream = await (isFile ? askEngine : askServer)(action, fields, signal);
    for (const reader = stream.getReader();;) {
        const {done, value} = await reader.read();
        if (done || signal?.aborted) return;
        if (value.error) throw new UserError(value.error);
        yield value;
    }
}

// Each kind of request has at most one that is running: a new one ends the one before.
const turns = {};
function beginTurn(kind) {
    turns[kind]?.abort();
    turns[kind] = new AbortController();
    return turns[kind].signal;
}

const isWide = () => matchMedia("(min-width: 950px)").matches;
const average = numbers => numbers.reduce((a, b) => a + b, 0) / numbers.length;
const percent = p => p === 0 ? "0%" : p < 0.0005 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;
// The square root separates 1% from 5% as well as 50% from 80%.
const shade = p => Math.sqrt(p).toFixed(2);

// Color an element by a probability.
function withColor(node, p) {
    node.style.setProperty("--p", p.toFixed(4));
    node.style.setProperty("--shade", shade(p));
    return node;
}
const cell = (p, ...children) => withColor(html("td", {class: "bar"}, ...children, percent(p)), p);

// The model
let runs = {};  // the checkpoints of each run

const integer = n => n.toLocaleString("en");
const short = n => Number(n.toPrecision(3));

// Return the size of a model, its step and its loss.
async function describe(checkpoint, {config: c, parameters, step}) {
    const run = Object.keys(runs).find(run => runs[run].includes(checkpoint));
    let loss = "no validation loss in its log";
    try {
        const {value: {records}} = await ask("log", {run, version: null}).next();
        const r = records.findLast(r => r.val_loss != null && r.step <= step);
        const when = r.step === step ? "" : ` at step ${integer(r.step)}`;
        loss = `validation loss ${r.val_loss.toFixed(3)}${when} (epoch ${short(r.epoch)})`;
    } catch { /* there is no log, or no loss in it */ }
    return `${integer(parameters)} parameters: ${c.n_layer} layers, ${c.n_head} heads, ${c.n_embd} `
        + `wide, context ${integer(c.block_size)}, vocabulary ${integer(c.vocab_size)}; step `
        + `${integer(step)}, ${loss}`;
}

// Return the number in an input. Throws UserError if it is not one that the input takes.
function numberIn(id) {
    const {validity, valueAsNumber, labels, min, max} = byId(id);
    if (validity.valid) return valueAsNumber;
    throw new UserError(`${labels[0].firstChild.textContent.trim()}: write a number from ${min} to `
        + `${integer(Number(max))}.`);
}

// Return the options of sample.py with these names.
function samplingOptions() {
    const [temperature, top_k, top_p, max_new_tokens, seed] =
        ["temperature", "top_k", "top_p", "max_new_tokens", "seed"].map(numberIn);
    return {temperature, top_k: top_k || null, top_p: top_p < 1 ? top_p : null, max_new_tokens, seed};
}

// The prompt; null asks for the one of the run's own samples, as long as nobody has typed another.
let typed = false;
const prompt = () => typed ? byId("prompt").value : null;

// Return whether the prompt is not known yet, and say so. The tabs are drawn again when it is.
function isLoading(id) {
    if (typed || byId("prompt").value) return false;
    show(id, "loading the model ...");
    return true;
}

// Write: a text and, for one token, its candidates, its attention and the logit lens

let written = {checkpoint: "", prompt: "", tokens: [], goal: 0};  // goal: the planned length
let undone = [];  // earlier texts
let chosen = 0;
let following = true;  // scroll to the end while the text grows, until the user chooses a token
let looked = null;  // the answer about the chosen token

const promptSpan = text => html("span", {class: "prompt"}, text);
const label = token => labelOf(token.bytes);
const idsOf = tokens => tokens.map(token => token.id);

// Append the element of the last token.
function appendToken(box, tokens) {
    const {bytes, p} = tokens.at(-1), number = tokens.length - 1;
    const before = tokens.slice(-5, -1).map(token => token.bytes);
    const span = html("span", {class: "token", title: percent(p), "data-token": number});
    addedText(before, bytes).split("\n").forEach((line, i) => {  // show a line end, to be clicked
        if (i > 0) span.append(html("i", {}, "↵"), "\n");
        span.append(line);
    });
    box.append(withColor(span, p));
}

function drawText() {
    byId("text").replaceChildren(promptSpan(written.prompt));
    written.tokens.forEach((_, i) => appendToken(byId("text"), written.tokens.slice(0, i + 1)));
    byId("write-back").hidden = !undone.length;
}

// Ask for what the model computed before it wrote the chosen token.
async function look() {
    const signal = beginTurn("look"), {checkpoint, prompt: text, tokens, config} = written;
    const n = Number(byId("way-head").value), {n_head} = config, layer = Math.floor(n / n_head);
    const place = {number: chosen, id: tokens[chosen].id, layer, head: n % n_head};
    const request = {...place, checkpoint, text, written: idsOf(tokens.slice(0, chosen))};
    try {
        for await (const answer of ask("look", request, signal)) {
            looked = {...answer, ...place};
            drawCandidates();
            drawRow();
            byId("lens").replaceChildren(...answer.lens.map((best, i) => html("tr", {},
                html("th", {scope: "row"}, i + 1), ...best.map(c => cell(c.p,
                    html(c.id === place.id ? "b" : "span", {class: "piece"}, label(c)), " ")))));
            redraw();
        }
    } catch (error) {
        report("about", error);
    }
}

function drawSampling() {
    byId("temperature-now").value = byId("temperature").value;
    try {
        samplingOptions();
        show("about", "");
        if (looked) drawCandidates();
    } catch (error) {
        report("about", error);
    }
}

function drawCandidates() {
    const says = drawnWith(looked.logits, {temperature: 1});
    const drawn = drawnWith(looked.logits, samplingOptions());
    byId("candidates").replaceChildren(...looked.candidates.map(c => html("tr",
        {class: c.id === looked.id ? "taken" : ""},
        html("td", {}, integer(c.rank)),
        html("th", {scope: "row"}, html("button", {"data-id": c.id}, label(c))),
        cell(says[c.rank - 1]), cell(drawn[c.rank - 1]))));
}

// Show what the last token of the context looked at, in one head or in the mean of all.
function drawRow() {
    const heads = looked.rows.flat(), head = heads[byId("row-head").value];
    const row = head ?? heads[0].map((_, i) => average(heads.map(weights => weights[i])));
    const largest = Math.max(...row);
    byId("row").replaceChildren(...looked.context.map((token, i) => withColor(
        html("span", {class: "seen", title: percent(row[i])}, label(token)), row[i] / largest)));
    byId("row").scrollTop = byId("row").scrollHeight;
}

function choose(number) {
    const spans = byId("text").querySelectorAll(".token");
    for (const view of document.querySelectorAll(".token-view")) view.hidden = !spans.length;
    if (!spans[number]) return;
    spans[chosen]?.classList.remove("chosen");
    chosen = number;
    spans[chosen].classList.add("chosen");
    byId("choice").replaceChildren(`Token ${chosen + 1} is `,
        html("b", {}, label(written.tokens[chosen])), ". The candidates were:");
    look();
}

function chooseByHand(number) {
    following = false;
    choose(number);
    byId("text").querySelector(".chosen")?.scrollIntoView({block: "nearest"});
    if (!isWide()) byId("candidates").scrollIntoView({block: "nearest"});
}

// Write `count` tokens after those of the text. `fresh` begins a new text with the prompt.
async function writeText({fresh = true, count} = {}) {
    const signal = beginTurn("write"), box = byId("text"), checkpoint = byId("checkpoint").value;
    following = true;
    mapOver("text");
    if (fresh) {
        turns.look?.abort();
        if (checkpoint !== written.checkpoint) show("model-about", "");
        written = {checkpoint, prompt: "", tokens: [], goal: 0};
        [undone, chosen, looked] = [[], 0, null];
        drawText();
        choose(0);
    }
    const {tokens} = written, begun = tokens.length;
    const loading = setTimeout(show, 300, "about", "loading the model ...");
    try {
        const options = {...samplingOptions(), start: (fresh ? prompt() : written.prompt) ?? undefined};
        options.max_new_tokens = count ?? options.max_new_tokens;
        written.goal = begun + options.max_new_tokens;
        const request = {checkpoint: written.checkpoint, options, written: idsOf(tokens)};
        for await (const answer of ask("write", request, signal)) {
            clearTimeout(loading);
            if (answer.config) {
                const {count: length, config: {block_size: limit}} = answer;
                show("about", length <= limit ? "" : `The prompt has ${integer(length)} tokens, and `
                    + `this model sees the last ${integer(limit)}.`);
                if (fresh) beginText(answer);
                continue;
            }
            tokens.push(answer);
            appendToken(box, tokens);
            if (tokens.length === begun + 1 && (fresh || count === 1)) choose(begun);
            if (following) box.scrollTop = box.scrollHeight;
        }
        if (!signal.aborted && tokens.length < written.goal)
            show("about", "The model ended the text here.");
    } catch (error) {
        report("about", error);
    }
    clearTimeout(loading);
}

// The model has answered: show its facts and the prompt, which may be the one of the run's samples.
function beginText(answer) {
    const {checkpoint} = Object.assign(written, answer);
    if (!typed) byId("prompt").value = answer.prompt;
    drawText();
    for (const select of [byId("row-head"), byId("way-head")]) {
        const {n_layer, n_head} = answer.config, before = Math.max(0, select.selectedIndex);
        const all = select.querySelector("[value=all]") ?? "", heads = Array(n_layer * n_head).fill();
        select.replaceChildren(all, ...heads.map((_, i) => html("option", {value: i},
            `layer ${Math.floor(i / n_head) + 1}, head ${i % n_head + 1}`)));
        select.selectedIndex = Math.min(before, select.options.length - 1);
    }
    describe(checkpoint, answer).then(about => {
        if (checkpoint === written.checkpoint) show("model-about", `${checkpoint}: ${about}`);
    });
    redraw();
}

// Put a candidate in the place of the token that was looked at, and go on to the old length.
function replaceToken(candidate) {
    const {tokens, goal} = written, {number, logits} = looked, count = goal - number - 1;
    const p = drawnWith(logits, {temperature: 1})[candidate.rank - 1];
    undone.push({tokens: [...tokens], number});
    written.tokens = [...tokens.slice(0, number), {...candidate, p}];
    drawText();
    choose(number);
    if (count > 0) writeText({fresh: false, count});
}

// Go on with the text, or begin a new one if the prompt or the checkpoint is another one now.
function continueText(count) {
    const same = written.prompt && (prompt() ?? written.prompt) === written.prompt
        && written.checkpoint === byId("checkpoint").value;
    writeText({fresh: !same, count});
}

function stopWriting() {
    turns.write?.abort();
    written.goal = written.tokens.length;
}

function undo() {
    const {tokens, number} = undone.pop();
    written.tokens = tokens;
    stopWriting();
    drawText();
    chooseByHand(number);
}

// Tokens: the pieces of the prompt
async function drawTokens() {
    const signal = beginTurn("tokens"), text = byId("prompt").value;
    const fields = {checkpoint: byId("checkpoint").value, text, written: [], masked: true, maps: false};
    if (isLoading("tokens-message")) return;
    try {
        for await (const {tokens, losses, count} of ask("read", {...fields, count: 1e6}, signal)) {
            const many = (n, word) => `${integer(n)} ${word}${n === 1 ? "" : "s"}`;
            const shown = tokens.length < count ? `; these are the first ${tokens.length}` : "";
            const loss = losses.length ? ` Loss: ${average(losses).toFixed(3)} nats per token, the `
                + "mean of -ln(probability)." : "";
            show("tokens-message", `${many(Array.from(text).length, "character")}, `
                + `${many(count, "token")}${shown}.${loss}`);
            byId("pieces").replaceChildren(...tokens.map((token, i) => {
                const p = i ? Math.exp(-losses[i - 1]) : 0, known = i ? "piece token" : "piece";
                return html("li", {}, withColor(html("span", {class: known}, label(token)), p),
                    html("small", {}, `id ${token.id}`), html("small", {}, i ? percent(p) : "first"));
            }));
        }
    } catch (error) {
        if (error.name !== "AbortError") byId("pieces").replaceChildren();
        report("tokens-message", error);
    }
}

// Attention: which token looks at which

let seen = null;  // the labels of the tokens, and the maps of all heads
let head = [0, 0];  // the layer and the head that are large

const mapOver = what => { document.querySelector(`[name="over"][value="${what}"]`).checked = true; };

function verdict([masked, unmasked]) {
    const losses = `Without the mask the loss goes from ${masked.toFixed(3)} to ${unmasked.toFixed(3)}`;
    return unmasked < masked / 2
        ? `${losses}, which is impossibly good: this model was trained without the mask. It copies `
            + "each answer from the next token, which does not exist when it writes."
        : `${losses}: this model was trained with the mask and never learned to use later tokens.`;
}

function heatMap({weights, masked}, labels) {
    const size = 16, T = labels.length, unit = Math.max(1, T / 26);  // of the letters
    const names = labels.map(name => name.length <= 9 ? name : `${name.slice(0, 8)}…`);
    const longest = Math.max(...names.map(name => name.length));
    const margin = unit * (26 + 7 * longest), side = margin + T * size + 1, end = side - 1;
    const steps = `M${margin} ${margin}${`h${size}v${size}`.repeat(T)}`;  // the future is above
    const map = svg("svg", {viewBox: `0 0 ${side} ${side}`, role: "img",
        "aria-label": `attention ${masked ? "with" : "without"} the mask`});
    map.style.maxWidth = `${Math.round(1.5 * side)}px`;
    map.style.setProperty("--unit", unit);
    if (masked) map.append(svg("path", {class: "masked", d: `${steps}V${margin}Z`}));
    for (let row = 0; row < T; row++) {
        for (let column = 0; column < (masked ? row + 1 : T); column++) {
            const p = weights[row][column];
            map.append(svg("rect", {
                class: column > row ? "future" : "past", x: margin + column * size,
                y: margin + row * size, width: size, height: size, "fill-opacity": shade(p),
            }, svg("title", {}, `${names[row]} looks at ${names[column]}: ${percent(p)}`)));
        }
        if (row % Math.ceil(unit)) continue;  // no room for every name
        const middle = margin + (row + 0.5) * size, edge = margin - 5 * unit;
        const turned = {transform: `translate(${middle + 4 * unit} ${edge}) rotate(-90)`};
        const upright = {x: middle, y: edge, "text-anchor": "middle"};
        map.append(
            svg("text", {x: edge, y: middle + 4 * unit, "text-anchor": "end"}, names[row]),
            svg("text", longest === 1 ? upright : turned, names[row]));
    }
    const below = `translate(${11 * unit} ${end}) rotate(-90)`;
    map.append(
        svg("path", {class: "stairs", d: steps}),
        svg("text", {class: "axis", x: margin, y: 11 * unit}, "looked at (keys) →"),
        svg("text", {class: "axis", transform: below}, "looking (queries) →"));
    return map;
}

function figure({masked, loss, weights}, labels) {
    const [layer, number] = head, rows = Array.from(weights[layer][number], row => Array.from(row));
    const future = average(rows.map((row, i) => row.slice(i + 1).reduce((a, b) => a + b, 0)));
    const name = `Layer ${layer + 1}, head ${number + 1}, ${masked ? "with" : "without"} the mask`;
    return html("figure", {}, html("figcaption", {}, html("b", {}, name), html("br"),
        `loss ${loss.toFixed(3)} nats per token, ${percent(future)} of the attention on the future`),
    heatMap({masked, weights: rows}, labels));
}

// Return a canvas with a pixel for each number: blue above 0, orange below, strong if it is large.
function picture(rows, largest = 1) {
    const canvas = html("canvas", {width: rows[0].length, height: rows.length, "aria-hidden": true});
    const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
    const [past, future] = ["--past", "--future"].map(name => style.getPropertyValue(name));
    rows.forEach((row, y) => row.forEach((value, x) => {
        context.fillStyle = value < 0 ? future : past;
        context.globalAlpha = shade(Math.abs(value) / largest);
        context.fillRect(x, y, 1, 1);
    }));
    return canvas;
}

function drawHeads() {
    byId("heads-figure").hidden = !seen;
    if (!seen) return byId("maps").replaceChildren();
    const layers = seen.maps[0].weights;
    byId("heads").style.setProperty("--heads", layers[0].length);
    byId("heads").replaceChildren(...layers.flatMap((heads, layer) => heads.map((weights, number) =>
        html("button", {"data-head": [layer, number], "aria-pressed": false,
            title: `layer ${layer + 1}, head ${number + 1}`}, picture(weights)))));
    enlarge(...head);
}

function enlarge(layer, number) {
    const layers = seen.maps[0].weights, between = (n, end) => Math.max(0, Math.min(n, end - 1));
    head = [between(layer, layers.length), between(number, layers[0].length)];
    for (const button of byId("heads").children) {
        const pressed = button.dataset.head === String(head);
        button.setAttribute("aria-pressed", pressed);
        button.tabIndex = pressed ? 0 : -1;
    }
    byId("maps").replaceChildren(...seen.maps.map(map => figure(map, seen.labels)));
}

async function drawAttention() {
    const signal = beginTurn("attention"), {tokens: after, prompt: start} = written;
    const both = checked("over")[0] === "text" && after.length > 0;
    const text = both ? start : byId("prompt").value, ids = both ? idsOf(after) : [];
    const fields = {checkpoint: byId("checkpoint").value, text, written: ids, maps: true};
    if (isLoading("verdict")) return;
    try {
        const maps = [], count = numberIn("count");
        for (const masked of [true, false])
            for await (const answer of ask("read", {...fields, count, masked}, signal))
                maps.push({...answer, masked, loss: average(answer.losses)});
        const labels = maps[0].tokens.map(label), all = integer(maps[0].count);
        if (labels.length < 2)
            throw new UserError("Attention needs two tokens; write a longer prompt.");
        seen = {maps, labels};
        const shown = labels.length < maps[0].count ? `; the maps show the first ${labels.length}` : "";
        show("verdict", `The prompt ${both ? "with the text" : "alone"} has ${all} tokens${shown}. `
            + verdict(maps.map(map => map.loss)));
    } catch (error) {
        if (error.name === "AbortError") return;
        seen = null;
        report("verdict", error);
    }
    drawHeads();
}

// Inside: the numbers of the last tokens, from the answer about the chosen token

// Return the steps: a name, a sentence with this text's own numbers, and matrices of the last tokens.
function stepsInside({values: x, context, layer}) {
    const n = x.q.length, C = x.input[0].length, hs = x.q[0].length, at = context.length - 1;
    const names = context.slice(-n).map(label), last = names[n - 1];
    const near = x.weights.map(row => Array.from(row).slice(-n));  // attention among these tokens
    const most = near[n - 1].indexOf(Math.max(...near[n - 1])), percentage = percent(near[n - 1][most]);
    const product = Array.from(x.q[n - 1], (q, i) => q * x.k[most][i]).reduce((a, b) => a + b);
    const active = percent(average(Array.from(x.hidden[n - 1], value => Number(value > 0))));
    return [
        layer > 0
            ? [`Output of layer ${layer}`, `This layer begins with ${C} numbers per token.`, x.input]
            : ["Embedding", `“${last}” is token id ${context[at].id} at position ${at}: two learned `
                + `rows of ${C} numbers, added.`, x.input],
        ["LayerNorm", "Each token's numbers with mean 0 and variance 1, times learned factors.", x.normed],
        ["Query, key, value", `Three matrices make ${hs} numbers each for this head.`, x.q, x.k, x.v],
        ["Attention", `The query of “${last}” times the key of “${names[most]}”, divided by √${hs}, `
            + `is ${(product / Math.sqrt(hs)).toFixed(2)}; the softmax makes it ${percentage}.`, near],
        ["Attention adds", `The values of all heads, weighted: ${C} numbers again.`, x.attention],
        ["MLP", `${4 * C} numbers after GELU, ${active} of them above 0 for “${last}”, and the ${C} `
            + "that they add.", x.hidden, x.mlp],
        [`Output of layer ${layer + 1}`, "The input plus what attention and MLP add.", x.output],
    ];
}

function drawInside() {
    if (!looked) return isLoading("inside-message") || show("inside-message", "Write a text first.", true);
    const {candidates, logits, id, number} = looked, says = drawnWith(logits, {temperature: 1});
    const name = label(candidates.find(c => c.id === id));
    show("inside-message", `What happened before token ${number + 1} of the text, “${name}”:`);
    const names = looked.context.slice(-looked.values.q.length).map(label);
    const strip = (name, rows) => Object.assign(
        picture(rows, Math.max(...rows.flatMap(row => Array.from(row, Math.abs)))),
        {describe: (x, y) => `${name}, “${names[y]}”, number ${x + 1} of ${rows[0].length}: `
            + rows[y][x].toFixed(4)});
    const figures = stepsInside(looked).map(([name, words, ...matrices]) => html("li", {},
        html("h2", {}, name), html("p", {}, words), html("div", {class: "strips"},
            html("div", {class: "names"}, ...names.map(name => html("span", {}, name))),
            ...matrices.map(rows => strip(name, rows)))));
    byId("way").replaceChildren(...figures, html("li", {}, html("h2", {}, "Probabilities"),
        html("p", {}, `After the last layer, the head gives “${label(candidates[0])}” the logit `
            + `${logits[0].toFixed(2)}; the softmax makes it ${percent(says[0])}.`),
        html("table", {}, html("tbody", {}, ...candidates.slice(0, 5).map(c => html("tr", {},
            html("th", {scope: "row"}, label(c)), cell(says[c.rank - 1])))))));
}

// Compare: one prompt, several checkpoints and temperatures

const checked = id => Array.from(byId(id).querySelectorAll(":checked"), box => box.value);

async function compareTexts() {
    const signal = beginTurn("compare");
    try {
        const options = {...samplingOptions(), start: prompt() ?? undefined};
        const cards = checked("compared").flatMap(checkpoint => checked("temperatures").map(value => {
            const temperature = value === "" ? options.temperature : Number(value);
            const title = html("h2", {}, `${checkpoint}, temperature ${temperature}`);
            const about = html("p", {}, "..."), text = html("div", {class: "text"});
            const request = {checkpoint, options: {...options, temperature}, written: []};
            return {request, about, text, card: html("article", {}, title, about, text)};
        }));
        byId("cards").replaceChildren(...cards.map(({card}) => card));
        show("compare-message", cards.length ? "" : "Choose a checkpoint and a temperature.", true);
        for (const {request, about, text} of cards) await fillCard(request, about, text, signal);
    } catch (error) {
        report("compare-message", error);
    }
}

async function fillCard(request, about, text, signal) {
    const tokens = [];
    try {
        for await (const answer of ask("write", request, signal)) {
            if (answer.config) {
                about.textContent = await describe(request.checkpoint, answer);
                text.append(promptSpan(answer.prompt));
            } else {
                tokens.push(answer);
                appendToken(text, tokens);
            }
        }
    } catch (error) {
        if (!(error instanceof UserError)) throw error;
        about.className = "message alert";
        about.textContent = error.message;
    }
}

// Learning: the losses and the samples of a run
const CURVES = {loss: "batch", train_loss: "training", val_loss: "validation"};
const NO_LOG = {version: null, records: []};
let log = NO_LOG;
const samples = () => log.records.filter(record => record.sample != null);
const moment = () => samples()[byId("moment").value];

// Three to eight round numbers between `low` and `high`.
function ticks(low, high) {
    const power = 10 ** Math.floor(Math.log10((high - low) / 3));
    const step = [5, 2, 1].map(n => n * power).find(n => (high - low) / n >= 3) ?? power;
    const first = Math.ceil(low / step);
    return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) =>
        Number(((first + i) * step).toPrecision(12)));
}

function drawLoss() {
    const box = byId("curve"), width = Math.max(300, box.clientWidth), height = 420;
    const points = Object.keys(CURVES).map(key =>
        [key, log.records.filter(r => r[key] != null).map(r => [r.step, r[key]])]);
    const all = points.flatMap(([, curve]) => curve);
    if (!all.length) return box.replaceChildren();
    const steps = all.map(([step]) => step).concat(samples().map(({step}) => step));
    const range = numbers => numbers.reduce(
        ([a, b], n) => [Math.min(a, n), Math.max(b, n)], [Infinity, -Infinity]);
    let [[left, right], [low, high]] = [range(steps), range(all.map(([, loss]) => loss))];
    if (left === right) right = left + 1;
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const x = step => 50 + (width - 65) * (step - left) / (right - left);
    const y = loss => 40 + (height - 80) * (high - loss) / (high - low);
    const plot = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "loss by step"});
    for (const loss of ticks(low, high)) plot.append(
        svg("line", {class: "grid", x1: 50, x2: width - 15, y1: y(loss), y2: y(loss)}),
        svg("text", {class: "axis", x: 44, y: y(loss) + 4, "text-anchor": "end"}, String(loss)));
    for (const step of ticks(left, right)) plot.append(
        svg("text", {class: "axis", x: x(step), y: height - 20, "text-anchor": "middle"}, integer(step)));
    points.forEach(([key, curve], i) => {
        const stride = Math.ceil(curve.length / 2000);  // a screen does not show more points
        const path = curve.filter((_, j) => j % stride === 0 || j === curve.length - 1);
        const points = path.map(([step, loss]) => [x(step), y(loss)]);
        // An evaluation is a dot. After the first one, the loss falls faster than a straight line.
        const dots = key === "loss" ? [] : points.map(([cx, cy]) => svg("circle", {class: key, cx, cy, r: 3}));
        const line = key === "loss" ? points : points.slice(1);
        plot.append(...dots,
            svg("polyline", {class: `curve ${key}`, points: line.join(" ")}),
            svg("text", {class: `axis ${key}`, x: 50 + 90 * i, y: 16}, `— ${CURVES[key]}`));
    });
    const axis = {class: "axis", x: width / 2, y: height - 4, "text-anchor": "middle"};
    const at = moment() ? x(moment().step) : -99;  // outside, without a sample
    const pointer = svg("path", {class: "pointer"});
    plot.append(svg("text", axis, "step (losses in nats per token)"), pointer,
        svg("path", {class: "moment", d: `M${at} 40V${height - 40}`}),
        svg("circle", {class: "moment", cx: at, cy: 40, r: 5}));
    plot.addEventListener("pointermove", event => {
        const at = left + (event.offsetX * width / plot.clientWidth - 50) / (width - 65) * (right - left);
        const step = all.reduce((best, [s]) => Math.abs(s - at) < Math.abs(best - at) ? s : best, left);
        pointer.setAttribute("d", `M${x(step)} 40V${height - 40}`);
        byId("reading").textContent = readLosses(step);
    });
    box.replaceChildren(plot);
}

// Return the losses of a step, as in "validation loss 2.048 at step 300".
function readLosses(step, names = CURVES) {
    const parts = Object.entries(names).flatMap(([key, name]) => {
        const record = log.records.find(r => r.step === step && r[key] != null);
        return record ? [`${name} loss ${record[key].toFixed(3)}`] : [];
    });
    return `${parts.join(", ")} at step ${integer(step)}`;
}

function drawLearning() {
    const slider = byId("moment"), all = samples(), atEnd = slider.value === slider.max;
    slider.max = Math.max(0, all.length - 1);
    if (atEnd) slider.value = slider.max;  // stay there while training adds samples
    drawLoss();
    byId("moments").hidden = byId("sample").hidden = !all.length;
    const record = moment();
    if (!record) return show("sample-about", "This run logs no samples.");
    const evaluated = log.records.findLast(r => r.val_loss != null && r.step <= record.step);
    const loss = evaluated ? `; ${readLosses(evaluated.step, {val_loss: "validation"})}` : "";
    show("sample-about", `Sample ${Number(slider.value) + 1} of ${all.length}, at step `
        + `${integer(record.step)}, epoch ${short(record.epoch)}${loss}`);
    slider.setAttribute("aria-valuetext", byId("sample-about").textContent);
    byId("sample").textContent = record.sample;
}

async function refreshLog() {
    const signal = beginTurn("log"), run = byId("run").value;
    try {
        for await (const answer of ask("log", {run, version: log.version}, signal)) {
            log = answer;
            drawLearning();
            const last = log.records.at(-1), parts = ["train_loss", "val_loss"].flatMap(key => {
                const record = log.records.findLast(r => r[key] != null);
                return record ? [`${CURVES[key]} loss ${record[key].toFixed(3)}`] : [];
            });
            show("figures", last ? [`step ${integer(last.step)}`, `epoch ${short(last.epoch)}`, ...parts]
                .join(", ") : "no losses yet");
        }
    } catch (error) {
        if (error.name === "AbortError") return;
        log = NO_LOG;
        drawLearning();
        report("figures", error);
    }
}

// Runs and their checkpoints, which may come and go
function offer(newest) {
    const found = Object.values(runs).flat(), select = byId("checkpoint"), before = select.value;
    const empty = Object.keys(runs).filter(run => !runs[run].length).join(", ");
    show("notice", empty && `No checkpoint yet in ${empty}; it appears here when it exists.`, true);
    // What is chosen stays chosen, also while training replaces its file.
    const paths = before && !found.includes(before) ? [before, ...found] : found;
    select.replaceChildren(...paths.map(path => html("option", {value: path}, path)));
    select.value = before || found[0] || "";
    const fieldset = byId("compared"), compared = checked("compared");
    const first = compared.length ? compared : Object.values(runs).map(paths => paths[0]);
    fieldset.replaceChildren(fieldset.querySelector("legend"), ...found.map(path => {
        const box = html("input", {type: "checkbox", value: path});
        box.checked = first.includes(path);
        return html("label", {}, box, ` ${path}`);
    }));
    byId("checkpoints").hidden = fieldset.hidden = paths.length === 1;  // nothing to choose
    if (!byId("run").options.length) {
        byId("run").append(...Object.keys(runs).map(run => html("option", {value: run}, run)));
        byId("run").value = newest;
        byId("run").parentElement.hidden = byId("run").options.length === 1;
        for (const box of byId("temperatures").querySelectorAll("input"))
            box.checked ||= byId("run").options.length === 1;  // one run is compared with itself
    }
    if (!before && found.length) writeText();
}

async function refresh() {
    try {
        for await (const answer of ask("runs", {})) {
            const changed = JSON.stringify(answer.runs) !== JSON.stringify(runs);
            runs = answer.runs;
            if (changed) offer(answer.newest);
        }
        if (!byId("learning").hidden) await refreshLog();
    } catch (error) {
        report("notice", error);
        runs = {};
    }
    if (!isFile) setTimeout(refresh, 1000);
}

// Draw what depends on the prompt, the checkpoint and the chosen token.
function redraw() {
    if (!byId("tokens").hidden) drawTokens();
    if (!byId("attention").hidden) drawAttention();
    if (!byId("inside").hidden) drawInside();
}

function openTab(name) {
    for (const tab of byId("tabs").children) {
        const open = tab.id === `tab-${name}`;
        tab.setAttribute("aria-selected", open);
        tab.tabIndex = open ? 0 : -1;
        byId(tab.getAttribute("aria-controls")).hidden = !open;
    }
    for (const control of document.querySelectorAll("[data-tabs]"))
        control.classList.toggle("away", !control.dataset.tabs.split(" ").includes(name));
    byId(name).querySelector(".sampling-place")?.append(byId("sampling"));
    redraw();
    if (name === "learning") refreshLog().then(drawLearning);
}

function connect() {
    const on = (id, event, action) => byId(id).addEventListener(event, action);
    for (const id of ["controls", "sampling"]) on(id, "submit", event => event.preventDefault());
    on("write-start", "click", () => writeText());
    on("write-next", "click", () => continueText(1));
    on("write-more", "click", () => continueText());
    on("write-stop", "click", stopWriting);
    on("write-back", "click", undo);
    on("candidates", "click", event => {
        const id = event.target.closest("[data-id]")?.dataset.id;
        if (!id) return;
        replaceToken(looked.candidates.find(c => c.id === Number(id)));
        byId("write-back").focus({preventScroll: true});  // the button that was clicked is gone
    });
    on("sampling", "input", drawSampling);
    on("row-head", "change", drawRow);
    on("way-head", "change", look);
    for (const event of ["pointermove", "click"]) on("way", event, ({target, offsetX, offsetY}) => {
        const column = Math.floor(offsetX / target.clientWidth * target.width);
        const row = Math.floor(offsetY / target.clientHeight * target.height);
        if (target.describe && column >= 0 && row >= 0 && column < target.width && row < target.height)
            byId("cell").textContent = target.describe(column, row);
    });
    on("compare-start", "click", compareTexts);
    on("compare-stop", "click", () => turns.compare?.abort());
    on("text", "click", event => {
        const token = event.target.closest("[data-token]");
        if (token) chooseByHand(Number(token.dataset.token));
    });
    on("text", "keydown", event => {
        const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (!step) return;
        event.preventDefault();
        chooseByHand(chosen + step);
    });
    on("prompt", "keydown", event => {
        if (event.key !== "Enter" || !event.shiftKey) return;
        event.preventDefault();
        writeText();
    });
    on("prompt", "input", () => {
        typed = true;
        mapOver("prompt");  // the written text continues another prompt
        redraw();
    });
    on("checkpoint", "change", () => writeText());
    on("attention", "change", drawAttention);
    on("heads", "click", event => {
        const button = event.target.closest("[data-head]");
        if (button) enlarge(...button.dataset.head.split(",").map(Number));
    });
    on("heads", "keydown", event => {
        const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
        if (!move[event.key]) return;
        event.preventDefault();
        enlarge(...head.map((n, i) => n + move[event.key][i]));
        byId("heads").querySelector("[tabindex='0']").focus();
    });
    on("moment", "input", drawLearning);
    on("run", "change", () => {
        log = NO_LOG;
        refreshLog();
    });
    on("tabs", "click", event => event.target.id && openTab(event.target.id.replace("tab-", "")));
    on("tabs", "keydown", event => {
        const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], tabs = [...byId("tabs").children];
        const next = step && tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
        if (!next) return;
        next.focus();
        next.click();
    });
    window.addEventListener("resize", drawLoss);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);  // the canvases
    byId("sampling").querySelector("details").open = isWide();
    byId("project").textContent = PROJECT + (isFile
        ? " made this page. The model is inside it and computes on your device." : "");
    drawSampling();
    openTab("write");
    refresh();
}

connect();

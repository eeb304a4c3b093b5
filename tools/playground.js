"use strict";
// Draw what tools/playground.py answers or, in a file that --to wrote, engine.js. Text reaches the page
// only as text nodes and attribute values, never as HTML, so a prompt, a token or a file name can not
// add elements or scripts.

const PROJECT = "gpt2-from-scratch";
const byId = id => document.getElementById(id);

function build(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
}
const html = (tag, attributes = {}, ...children) =>
    build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
    build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function show(id, text, alert = false) {
    const message = byId(id);
    message.classList.toggle("alert", alert);
    if (message.textContent !== text) message.textContent = text;
}

function report(id, error) {
    if (error.name === "AbortError") return;  // the user asked for something else
    if (error instanceof UserError) return show(id, error.message, true);
    show(id, "The program does not answer. Is it still running?", true);
}

// Send a request to the server; yield the objects of the answer, one per line, as they arrive.
async function* askServer(action, fields, signal) {
    const options = {method: "POST", body: JSON.stringify(fields), signal};
    const response = await fetch(action, options);
    if (!response.ok) throw new UserError(`The program refused the request (${response.status}).`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
        const {done, value} = await reader.read();
        if (done) return;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) yield JSON.parse(line);
    }
}

// In a file that --to wrote: the worker with the engine, and what waits for its answers.
const sent = byId("weights") !== null;
const waiting = new Map();
let worker;

function startEngine() {
    const source = new Blob([byId("engine").textContent], {type: "text/javascript"});
    worker = new Worker(URL.createObjectURL(source));
    worker.onmessage = ({data: {id, answer}}) => waiting.get(id)?.(answer);
    const [model, weights] = ["model", "weights"].map(id => byId(id).textContent);
    worker.postMessage({model, weights});
    byId("weights").remove();  // the worker has a copy
}

async function* askEngine(action, fields, signal) {
    const id = crypto.randomUUID(), answers = [];
    let wake = null;
    const receive = answer => {
        answers.push(answer);
        wake?.();
    };
    waiting.set(id, receive);
    signal?.addEventListener("abort", () => {
        worker.postMessage({id});
        receive(null);
    });
    worker.postMessage({id, action, fields});
    for (;;) {
        while (!answers.length) await new Promise(resolve => { wake = resolve; });
        signal?.throwIfAborted();
        if (answers[0] === null) break;
        yield answers.shift();
    }
    waiting.delete(id);
}

// Yield the answers to a request.
async function* ask(action, fields, signal) {
    for await (const answer of (sent ? askEngine : askServer)(action, fields, signal)) {
        if (answer.error) throw new UserError(answer.error);
        if (signal?.aborted) return;
        yield answer;
    }
}

// Each kind of request has at most one that is running: a new one ends the one before.
const turns = {};
function beginTurn(kind) {
    turns[kind]?.abort();
    turns[kind] = new AbortController();
    return turns[kind].signal;
}

const average = numbers => numbers.reduce((a, b) => a + b, 0) / numbers.length;
const percent = p => p === 0 ? "0%" : p < 0.0005 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;
// The square root separates 1% from 5% as well as 50% from 80%.
const shade = p => Math.sqrt(p).toFixed(2);

const cell = (p, ...children) => {
    const td = html("td", {class: "bar"}, ...children, percent(p));
    td.style.setProperty("--p", p.toFixed(4));
    return td;
};

// The model

let runs = {};  // the checkpoints of each run

const integer = n => n.toLocaleString("en");

// Return the size of a model, its step and its loss.
async function describe(checkpoint, {config: c, parameters, step}) {
    const run = Object.keys(runs).find(run => runs[run].includes(checkpoint));
    let loss = "no validation loss in its log";
    try {
        for await (const {records} of ask("log", {run, version: null})) {
            const r = records.findLast(r => r.val_loss != null && r.step <= step);
            if (!r) continue;
            loss = `validation loss ${r.val_loss.toFixed(3)}`;
            loss += r.step === step ? "" : ` at step ${integer(r.step)}`;
            loss += ` (epoch ${Number(r.epoch.toPrecision(3))})`;
        }
    } catch { /* the run has no log */ }
    return `${integer(parameters)} parameters: ${c.n_layer} layers, ${c.n_head} heads, `
        + `${c.n_embd} wide, context ${integer(c.block_size)}, vocabulary `
        + `${integer(c.vocab_size)}; step ${integer(step)}, ${loss}`;
}

// Return the number in an input. Throws UserError if it is not one that the input takes.
function numberIn(id) {
    const input = byId(id), {min, max, validity} = input;
    if (validity.valid) return input.valueAsNumber;
    const name = input.labels[0].firstChild.textContent.trim();
    throw new UserError(`${name}: write a number from ${min} to ${integer(Number(max))}.`);
}

function samplingOptions() {
    return {
        temperature: numberIn("temperature"),
        top_k: numberIn("top_k") || null,
        top_p: numberIn("top_p") === 1 ? null : numberIn("top_p"),
        max_new_tokens: numberIn("max_new_tokens"),
        seed: numberIn("seed"),
    };
}

function describeSettings({temperature, top_k, top_p}) {
    return `temperature ${temperature}` + (top_k === null ? "" : `, top-k ${top_k}`)
        + (top_p === null ? "" : `, top-p ${top_p}`);
}

// The prompt; null asks for the one of the run's own samples, as long as nobody has typed another.
let typed = false;
const prompt = () => typed ? byId("prompt").value : null;

// Return whether the prompt is not known yet, and say so. The tabs are drawn again when it is.
function isLoading(message) {
    const loading = !typed && !byId("prompt").value;
    if (loading) show(message, "loading the model ...");
    return loading;
}

// Write: a text and, for one token, its candidates, its attention and the logit lens

let written = {checkpoint: "", prompt: "", count: 0, tokens: []};
let undone = [];  // earlier texts, the last one last
let chosen = 0;
let following = true;  // scroll to the end while the text grows, until the user chooses a token
let looked = null;  // the answer about the chosen token

const promptSpan = text => html("span", {class: "prompt"}, text);

const label = token => labelOf(token.bytes);

// Return the element of tokens[number].
function tokenSpan(tokens, number) {
    const {bytes, p} = tokens[number];
    const before = tokens.slice(Math.max(0, number - 4), number).map(token => token.bytes);
    const span = html("span", {class: "token", title: percent(p), "data-token": number});
    span.style.setProperty("--shade", shade(p));
    addedText(before, bytes).split("\n").forEach((line, i) => {  // show a line end: one can click it
        if (i > 0) span.append(html("i", {}, "↵"), "\n");
        span.append(line);
    });
    return span;
}

const writtenIds = count => written.tokens.slice(0, count).map(token => token.id);

// Ask for what the model computed before it wrote the chosen token.
async function look() {
    const signal = beginTurn("look"), token = written.tokens[chosen];
    const n = Number(byId("way-head").value), {n_head} = written.config;
    const place = {layer: Math.floor(n / n_head), head: n % n_head, id: token.id};
    const request = {checkpoint: written.checkpoint, text: written.prompt, ...place};
    try {
        for await (const answer of ask("look", {...request, written: writtenIds(chosen)}, signal)) {
            looked = {...answer, ...place};
            drawCandidates();
            drawRow();
            byId("lens").replaceChildren(...answer.lens.map((best, i) => html("tr", {},
                html("th", {scope: "row"}, i + 1),
                ...best.map(c => cell(c.p,
                    html(c.id === token.id ? "b" : "span", {class: "piece"}, label(c)), " ")))));
            if (!byId("inside").hidden) drawWay();
        }
    } catch (error) {
        report("about", error);
    }
}

function drawCandidates() {
    if (!looked) return;
    const {logits, candidates, id} = looked, plain = {temperature: 1, top_k: null, top_p: null};
    const [says, drawn] = [plain, samplingOptions()].map(options => drawnWith(logits, options));
    byId("candidates").replaceChildren(...candidates.map(c => html("tr",
        {class: c.id === id ? "taken" : ""},
        html("td", {}, integer(c.rank)),
        html("th", {scope: "row"}, html("button", {"data-id": c.id}, label(c))),
        cell(says[c.rank - 1]), cell(drawn[c.rank - 1]))));
}

// Show which tokens the last one of the context looked at, in one head or in the mean of all.
function drawRow() {
    const heads = looked.rows.flat(), head = heads[byId("row-head").value];
    const shown = head ? [head] : heads;
    byId("row").replaceChildren(...looked.context.map((token, i) => {
        const p = shown.reduce((sum, row) => sum + row[i], 0) / shown.length;
        const span = html("span", {class: "seen", title: percent(p)}, label(token));
        span.style.setProperty("--shade", shade(p));
        return span;
    }));
    byId("row").scrollTop = byId("row").scrollHeight;
}

function offerHeads(select, {n_layer, n_head}) {
    const before = select.value, all = [...select.options].filter(option => option.value === "all");
    select.replaceChildren(...all, ...Array.from({length: n_layer * n_head}, (_, i) =>
        html("option", {value: i}, `layer ${Math.floor(i / n_head) + 1}, head ${i % n_head + 1}`)));
    select.value = before;
    if (!select.value) select.selectedIndex = 0;
}

function drawToken() {
    const token = written.tokens[chosen];
    for (const view of document.querySelectorAll(".token-view")) view.hidden = !token;
    if (!token) {
        turns.look?.abort();
        looked = null;
        return;
    }
    byId("choice").replaceChildren(
        `Token ${chosen + 1} is `, html("b", {}, label(token)), ". The candidates were:");
    look();
}

function choose(number) {
    const spans = byId("text").querySelectorAll(".token");
    if (!spans[number]) return;
    spans[chosen]?.classList.remove("chosen");
    chosen = number;
    spans[chosen].classList.add("chosen");
    drawToken();
}

function chooseByHand(number) {
    following = false;
    choose(number);
    byId("text").querySelector(".chosen")?.scrollIntoView({block: "nearest"});
    if (matchMedia("(max-width: 949px)").matches)
        byId("choice").parentElement.scrollIntoView({block: "nearest"});
}

function drawText() {
    byId("text").replaceChildren(promptSpan(written.prompt),
        ...written.tokens.map((_, i) => tokenSpan(written.tokens, i)));
    byId("write-back").hidden = !undone.length;
}

// Write `count` tokens after the tokens of the text. `fresh` begins a new text with the prompt.
async function writeText({fresh = true, count} = {}) {
    const signal = beginTurn("write"), box = byId("text"), checkpoint = byId("checkpoint").value;
    following = true;
    if (fresh) {
        written = {checkpoint, prompt: "", count: 0, tokens: [], goal: 0};
        [undone, chosen] = [[], 0];
        drawText();
        drawToken();
    }
    const {tokens} = written, begun = tokens.length;
    const loading = setTimeout(() => show("about", "loading the model ..."), 300);
    try {
        const options = {...samplingOptions(), start: fresh ? prompt() ?? undefined : written.prompt};
        if (count !== undefined) options.max_new_tokens = count;
        written.goal = begun + options.max_new_tokens;
        const request = {checkpoint: written.checkpoint, options, written: writtenIds()};
        let note = "";
        for await (const answer of ask("write", request, signal)) {
            clearTimeout(loading);
            if (answer.config) {
                const limit = answer.config.block_size;
                if (answer.count > limit) note = `The prompt has ${integer(answer.count)} tokens, and `
                    + `this model sees the last ${integer(limit)}.`;
                show("about", note);
                if (fresh) beginText(answer);
                continue;
            }
            tokens.push(answer);
            box.append(tokenSpan(tokens, tokens.length - 1));
            if (tokens.length === begun + 1 && (fresh || count === 1)) choose(begun);
            if (following) box.scrollTop = box.scrollHeight;
        }
        if (!signal.aborted && tokens.length < written.goal)
            show("about", `${note} The model ended the text here.`);
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
    for (const id of ["row-head", "way-head"]) offerHeads(byId(id), answer.config);
    describe(checkpoint, answer).then(about => {
        if (checkpoint === written.checkpoint) show("model-about", `${checkpoint}: ${about}`);
    });
    redraw();
}

// Put a candidate in the place of the chosen token and go on to the old length.
async function replaceToken(candidate) {
    const {tokens, goal} = written;
    undone.push({tokens: [...tokens], chosen});
    const p = drawnWith(looked.logits, {temperature: 1})[candidate.rank - 1];
    written.tokens = [...tokens.slice(0, chosen), {...candidate, p}];
    drawText();
    choose(chosen);
    await writeText({fresh: false, count: goal - written.tokens.length});
}

// Go on with the text, or begin a new one if the prompt or the checkpoint is another one now.
function continueText(count) {
    const same = (prompt() ?? written.prompt) === written.prompt
        && written.checkpoint === byId("checkpoint").value && written.prompt !== "";
    writeText({fresh: !same, count});
}

// Tokens: the pieces of the prompt

async function drawTokens() {
    const signal = beginTurn("tokens"), text = byId("prompt").value;
    const request = {checkpoint: byId("checkpoint").value, text, written: [], count: 1e6};
    if (isLoading("tokens-message")) return;
    try {
        const options = {...request, masked: true, maps: false};
        for await (const {tokens, losses, count} of ask("read", options, signal)) {
            const many = (n, word) => `${integer(n)} ${word}${n === 1 ? "" : "s"}`;
            const shown = tokens.length < count ? `; these are the first ${tokens.length}` : "";
            const mean = losses.length ? ` Loss: ${average(losses).toFixed(3)} nats per token, the mean of `
                + "-ln(probability)." : "";
            show("tokens-message", `${many(Array.from(text).length, "character")}, `
                + `${many(count, "token")}${shown}.${mean}`);
            byId("pieces").replaceChildren(...tokens.map((token, i) => {
                const p = i ? Math.exp(-losses[i - 1]) : null;
                const piece = html("span", {class: i ? "piece token" : "piece"}, label(token));
                piece.style.setProperty("--shade", shade(p ?? 0));
                return html("li", {}, piece, html("small", {}, `id ${token.id}`),
                    html("small", {}, i ? percent(p) : "first"));
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

function verdict([masked, unmasked]) {
    const losses = `Without the mask the loss goes from ${masked.toFixed(3)} to ${unmasked.toFixed(3)}`;
    if (unmasked < masked / 2)
        return `${losses}, which is impossibly good: this model was trained without the mask. It copies `
            + "each answer from the next token, which does not exist when it writes.";
    return `${losses}: this model was trained with the mask and never learned to use later tokens.`;
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
    const [left, top] = [11 * unit, 11 * unit];
    map.append(
        svg("path", {class: "stairs", d: steps}),
        svg("text", {class: "axis", x: margin, y: top}, "looked at (keys) →"),
        svg("text", {class: "axis", transform: `translate(${left} ${end}) rotate(-90)`},
            "looking (queries) →"));
    if (masked && T > 12) map.append(svg("text", {class: "axis", x: end - 6, y: margin + 20 * unit,
        "text-anchor": "end"}, "the future, masked"));
    return map;
}

function figure({masked, loss, weights}, labels) {
    const [layer, number] = head;
    const map = {masked, weights: weights[layer][number].map(row => Array.from(row))};
    const future = map.weights.flatMap((row, i) => row.slice(i + 1)).reduce((a, b) => a + b, 0);
    return html("figure", {}, html("figcaption", {},
        html("b", {}, `Layer ${layer + 1}, head ${number + 1}, ${masked ? "with" : "without"} the mask`),
        html("br"), `loss ${loss.toFixed(3)} nats per token, ${percent(future / labels.length)} of the `
            + "attention on the future"),
    heatMap(map, labels));
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

const thumbnail = (weights, layer, number) => html("button", {"data-head": [layer, number],
    "aria-pressed": false, title: `layer ${layer + 1}, head ${number + 1}`}, picture(weights));

function drawHeads() {
    byId("heads-figure").hidden = !seen;
    if (!seen) return byId("maps").replaceChildren();
    const layers = seen.maps[0].weights;
    byId("heads").style.setProperty("--heads", layers[0].length);
    byId("heads").replaceChildren(...layers.flatMap((heads, layer) => heads.map((weights, number) =>
        thumbnail(weights, layer, number))));
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
    const signal = beginTurn("attention");
    const both = byId("over").querySelector(":checked").value === "text" && written.tokens.length > 0;
    const request = {checkpoint: byId("checkpoint").value, maps: true,
        text: both ? written.prompt : byId("prompt").value, written: both ? writtenIds() : []};
    if (isLoading("verdict")) return;
    try {
        const maps = [];
        request.count = numberIn("count");
        for (const masked of [true, false])
            for await (const answer of ask("read", {...request, masked}, signal))
                maps.push({...answer, masked, loss: average(answer.losses)});
        const [{tokens, count}] = maps, what = both ? "The prompt with the text" : "The prompt alone";
        if (tokens.length < 2)
            throw new UserError("Attention needs 2 tokens, and the prompt has 1: write a longer prompt.");
        seen = {maps, labels: tokens.map(label)};
        const shown = tokens.length < count ? `; the maps show the first ${tokens.length}` : "";
        show("verdict", `${what} has ${integer(count)} tokens${shown}. `
            + verdict(maps.map(map => map.loss)));
    } catch (error) {
        if (error.name === "AbortError") return;
        seen = null;
        report("verdict", error);
    }
    drawHeads();
}

// Inside: the numbers of the last tokens, from the answer about the chosen token

// Return the steps of the way: a name, a sentence with this text's own numbers, and matrices.
function steps({values: v, context, layer, candidates, logits}) {
    const T = context.length, n = v.q.length, C = v.input[0].length, hs = v.q[0].length;
    const names = context.slice(-n).map(label), last = names[n - 1], weights = v.weights[n - 1];
    const near = Array.from(weights).slice(-n), most = near.indexOf(Math.max(...near));
    const score = average(Array.from(v.q[n - 1], (x, i) => x * v.k[most][i])) * Math.sqrt(hs);
    const active = average(Array.from(v.hidden[n - 1], x => Number(x > 0)));
    const shown = v.weights.map(row => Array.from(row).slice(-n));
    return [
        layer === 0
            ? ["Embedding", `“${last}” is token id ${context[T - 1].id}, at position ${T - 1}: two `
                + `learned rows of ${C} numbers, added.`, v.input]
            : [`Output of layer ${layer}`, `What this layer begins with: ${C} numbers per token.`, v.input],
        ["LayerNorm", "The same numbers, shifted and scaled to mean 0 and variance 1.", v.normed],
        ["Query, key, value", `Three products make ${hs} numbers each for this head.`, v.q, v.k, v.v],
        ["Attention", `The query of “${last}” times the key of “${names[most]}”, divided by √${hs}, is `
            + `${score.toFixed(2)}; the softmax makes it ${percent(near[most])}.`, shown],
        ["Attention adds", `The values, weighted so, of all heads: ${C} numbers again.`, v.attention],
        ["MLP", `${4 * C} numbers after GELU, ${percent(active)} above 0 for “${last}”; and what they `
            + "add.", v.hidden, v.mlp],
        [`Output of layer ${layer + 1}`, "The input plus what attention and MLP add.", v.output],
    ].map(([name, words, ...matrices]) => ({name, words, matrices, names}));
}

function drawWay() {
    if (!looked) return show("inside-message", "Write a text first.", true);
    const {candidates, logits, id} = looked, taken = candidates.find(c => c.id === id);
    show("inside-message", `Before token ${chosen + 1} of the text, which became “${label(taken)}”:`);
    const figures = steps(looked).map(({name, words, matrices, names}) => html("li", {},
        html("h2", {}, name), html("p", {}, words),
        html("div", {class: "strips"}, html("div", {class: "names"}, ...names.map(n => html("span", {}, n))),
            ...matrices.map(rows => {
                const canvas = picture(rows, Math.max(...rows.flatMap(row => [...row].map(Math.abs))));
                return Object.assign(canvas, {describe: (x, y) => `${name}, “${names[y]}”, number `
                    + `${x + 1} of ${rows[0].length}: ${rows[y][x].toFixed(4)}`});
            }))));
    const says = drawnWith(logits, {temperature: 1});
    byId("way").replaceChildren(...figures, html("li", {}, html("h2", {}, "Probabilities"),
        html("p", {}, `After the last layer, the head gives “${label(candidates[0])}” the logit `
            + `${logits[0].toFixed(2)}; the softmax makes it ${percent(says[0])}.`),
        html("table", {}, html("tbody", {}, ...candidates.slice(0, 8).map(c => html("tr", {},
            html("th", {scope: "row"}, label(c)), cell(says[c.rank - 1])))))));
}

// Compare: one prompt, several checkpoints

async function compareTexts() {
    const signal = beginTurn("compare"), cards = byId("cards");
    const checked = id => Array.from(byId(id).querySelectorAll(":checked"), box => box.value);
    const [paths, temperatures] = [checked("compared"), checked("temperatures")];
    cards.replaceChildren();
    try {
        const options = {...samplingOptions(), start: prompt() ?? undefined};
        if (!paths.length || !temperatures.length)
            throw new UserError("Choose a checkpoint and a temperature.");
        show("compare-message", `with ${describeSettings(options)}`);
        for (const checkpoint of paths) for (const value of temperatures) {
            const temperature = value === "" ? options.temperature : Number(value), tokens = [];
            const about = html("p"), text = html("div", {class: "text"});
            const title = paths.length > 1 ? `${checkpoint}, ` : "";
            cards.append(html("article", {},
                html("h2", {}, `${title}temperature ${temperature}`), about, text));
            const request = {checkpoint, options: {...options, temperature}, written: []};
            try {
                for await (const answer of ask("write", request, signal)) {
                    if (answer.config) {
                        about.textContent = await describe(checkpoint, answer);
                        text.append(promptSpan(answer.prompt));
                    } else {
                        tokens.push(answer);
                        text.append(tokenSpan(tokens, tokens.length - 1));
                    }
                }
            } catch (error) {
                if (!(error instanceof UserError)) throw error;
                about.className = "message alert";
                about.textContent = error.message;
            }
        }
    } catch (error) {
        report("compare-message", error);
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
        svg("text", {class: "axis", x: x(step), y: height - 20, "text-anchor": "middle"},
            step.toLocaleString("en")));
    points.forEach(([key, curve], i) => {
        const stride = Math.ceil(curve.length / 2000);  // a screen does not show more points
        const path = curve.filter((_, j) => j % stride === 0 || j === curve.length - 1);
        const points = path.map(([step, loss]) => [x(step), y(loss)]);
        // An evaluation is a dot. The fall after the first one is steeper than a straight line.
        const line = key === "loss" ? points : points.slice(1);
        if (key !== "loss") plot.append(...points.map(([cx, cy]) => svg("circle", {class: key, cx, cy, r: 3})));
        plot.append(
            svg("polyline", {class: `curve ${key}`, points: line.join(" ")}),
            svg("text", {class: `axis ${key}`, x: 50 + 90 * i, y: 16}, `— ${CURVES[key]}`));
    });
    plot.append(
        svg("text", {class: "axis", x: width / 2, y: height - 4, "text-anchor": "middle"},
            "step (losses in nats per token)"));
    if (moment()) {
        const at = x(moment().step);
        plot.append(svg("line", {class: "moment", x1: at, x2: at, y1: 40, y2: height - 40}),
            svg("circle", {class: "moment", cx: at, cy: 40, r: 5}));
    }
    const pointer = svg("line", {class: "pointer", y1: 40, y2: height - 40, visibility: "hidden"});
    plot.append(pointer);
    plot.addEventListener("pointermove", event => {
        const at = left + (event.offsetX * width / plot.clientWidth - 50) / (width - 65) * (right - left);
        const step = all.reduce((best, [s]) => Math.abs(s - at) < Math.abs(best - at) ? s : best, left);
        build(pointer, {x1: x(step), x2: x(step), visibility: "visible"}, []);
        byId("reading").textContent = readLosses(step);
    });
    box.replaceChildren(plot);
}

// The losses of a step, as in "validation loss 2.048 at step 300".
function readLosses(step, names = CURVES) {
    const parts = Object.entries(names).flatMap(([key, name]) => {
        const record = log.records.find(r => r.step === step && r[key] != null);
        return record ? [`${name} loss ${record[key].toFixed(3)}`] : [];
    });
    return `${parts.join(", ")} at step ${step.toLocaleString("en")}`;
}

function drawSample() {
    const slider = byId("moment"), all = samples();
    const atEnd = slider.value === slider.max;  // stay there while training adds samples
    slider.max = Math.max(0, all.length - 1);
    if (atEnd) slider.value = slider.max;
    byId("moments").hidden = byId("sample").hidden = !all.length;
    const record = moment();
    if (!record) return show("sample-about", "This run logs no samples; see train.py's sample_interval.");
    const evaluated = log.records.findLast(r => r.val_loss != null && r.step <= record.step);
    const about = `Sample ${Number(slider.value) + 1} of ${all.length}, at step `
        + `${record.step.toLocaleString("en")}, epoch ${Number(record.epoch.toPrecision(3))}`;
    show("sample-about", about + (evaluated ? `; ${readLosses(evaluated.step, {val_loss: "validation"})}` : ""));
    slider.setAttribute("aria-valuetext", byId("sample-about").textContent);
    byId("sample").textContent = record.sample;
}

function drawLearning() {
    drawSample();
    drawLoss();
}

async function refreshLog() {
    const signal = beginTurn("log"), run = byId("run").value;
    try {
        for await (const answer of ask("log", {run, version: log.version}, signal)) {
            log = answer;
            drawLearning();
            const last = log.records.at(-1);
            const losses = ["train_loss", "val_loss"].flatMap(key => {
                const record = log.records.findLast(r => r[key] != null);
                return record ? [`, ${CURVES[key]} loss ${record[key].toFixed(3)}`] : [];
            });
            show("figures", last ? `step ${last.step.toLocaleString("en")}, epoch `
                + `${Number(last.epoch.toPrecision(3))}${losses.join("")}` : "no losses yet");
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
    const empty = Object.keys(runs).filter(run => !runs[run].length);
    const notice = `No checkpoint yet in ${empty.join(", ")}; it appears here when it exists.`;
    show("notice", empty.length ? notice : "", empty.length > 0);
    // What is chosen stays chosen, also while training replaces its file.
    const paths = before && !found.includes(before) ? [before, ...found] : found;
    select.replaceChildren(...paths.map(path => html("option", {value: path}, path)));
    select.value = before || found[0] || "";
    const fieldset = byId("compared");
    const boxes = new Map(Array.from(fieldset.querySelectorAll("input"), box => [box.value, box.checked]));
    const labels = Object.values(runs).flatMap(paths => {
        const first = paths.some(path => boxes.get(path)) ? null : paths.find(path => !boxes.has(path));
        return paths.map(path => choice(path, ` ${path}`, boxes.get(path) ?? path === first));
    });
    fieldset.replaceChildren(fieldset.querySelector("legend"), ...labels);
    byId("checkpoints").hidden = fieldset.hidden = paths.length === 1;  // nothing to choose
    if (!byId("run").options.length) {
        byId("run").append(...Object.keys(runs).map(run => html("option", {value: run}, run)));
        byId("run").value = newest;
        byId("run").parentElement.hidden = byId("run").options.length === 1;
        // One run is compared with itself.
        byId("temperatures").append(...["", 0, 0.5, 1, 1.5].map(value => choice(value,
            value === "" ? " as above" : ` ${value}`,
            value === "" || byId("run").options.length === 1 && [0, 1.5].includes(value))));
    }
    if (!before && found.length) writeText();
}

function choice(value, text, checked) {
    const box = html("input", {type: "checkbox", value});
    box.checked = checked;
    return html("label", {}, box, text);
}

let refreshing = false;
async function refresh() {
    if (refreshing) return;
    refreshing = true;
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
    refreshing = false;
}

// Draw what depends on the prompt and the checkpoint.
function redraw() {
    if (!byId("tokens").hidden) drawTokens();
    if (!byId("attention").hidden) drawAttention();
    if (!byId("inside").hidden) drawWay();
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
    const over = value => { document.querySelector(`[name="over"][value="${value}"]`).checked = true; };
    const writeAnd = action => () => {
        over("text");
        action();
    };
    const start = writeAnd(() => writeText());
    for (const id of ["controls", "sampling"]) on(id, "submit", event => event.preventDefault());
    on("write-start", "click", start);
    on("write-next", "click", writeAnd(() => continueText(1)));
    on("write-more", "click", writeAnd(() => continueText()));
    on("write-stop", "click", () => {
        turns.write?.abort();
        written.goal = written.tokens.length;
    });
    on("write-back", "click", () => {
        turns.write?.abort();
        const {tokens, chosen: number} = undone.pop();
        Object.assign(written, {tokens, goal: tokens.length});
        drawText();
        chooseByHand(number);
    });
    on("candidates", "click", async event => {
        const id = event.target.closest("[data-id]")?.dataset.id;
        if (!id) return;
        const text = replaceToken(looked.candidates.find(c => c.id === Number(id)));
        byId("candidates").querySelector("button")?.focus();  // the one that was clicked is gone
        await text;
    });
    on("sampling", "input", () => {
        byId("temperature-now").value = numberIn("temperature").toFixed(2);
        try {
            drawCandidates();
            show("about", "");
        } catch (error) {
            report("about", error);
        }
    });
    on("row-head", "change", drawRow);
    on("way-head", "change", look);
    for (const event of ["pointermove", "click"]) on("way", event, ({target, offsetX, offsetY}) => {
        if (!target.describe) return;
        const at = (offset, size, count) => Math.min(count - 1, Math.max(0, Math.floor(offset / size * count)));
        byId("cell").textContent = target.describe(at(offsetX, target.clientWidth, target.width),
            at(offsetY, target.clientHeight, target.height));
    });
    for (const event of ["pointermove", "click"]) on("maps", event, ({target}) => {
        const words = target.querySelector?.("title")?.textContent;
        if (target.tagName === "rect") byId("looks").textContent = words;
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
        start();
    });
    on("prompt", "input", () => {
        typed = true;
        over("prompt");  // the written text continues another prompt
        redraw();
    });
    on("checkpoint", "change", start);
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
        drawLearning();
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
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
        drawHeads();
        if (!byId("inside").hidden) drawWay();
    });
    const wide = window.matchMedia("(min-width: 950px)").matches;
    byId("sampling").querySelector("details").open = wide;  // on a phone, the text comes first
    byId("temperature-now").value = numberIn("temperature").toFixed(2);
    byId("project").textContent = sent ? `Made with ${PROJECT}. The model is inside this page and computes on `
        + "your device: nothing is sent anywhere." : PROJECT;
    openTab("write");
    if (sent) startEngine();
    refresh();
    if (!sent) setInterval(refresh, 1000);
}

connect();

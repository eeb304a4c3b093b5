"use strict";
// Draw what tools/playground.py answers. Text reaches the page only as text nodes and attribute
// values, never as HTML, so a prompt, a token or a file name can not add elements or scripts.

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

// A mistake of the user, as the program reports it.
class UserError extends Error {}

function report(id, error) {
    if (error.name === "AbortError") return;  // the user asked for something else
    if (error instanceof UserError) return show(id, error.message, true);
    show(id, "The program does not answer. Is it still running?", true);
}

// Send a request; yield the JSON objects of the answer, one per line, as they arrive.
async function* ask(action, fields, signal) {
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
        for (const answer of lines.map(line => JSON.parse(line))) {
            if (answer.error) throw new UserError(answer.error);
            if (signal?.aborted) return;
            yield answer;
        }
    }
}

// Each kind of request has at most one that is running: a new one ends the one before.
const turns = {};
function beginTurn(kind) {
    turns[kind]?.abort();
    turns[kind] = new AbortController();
    return turns[kind].signal;
}

const percent = p => p === 0 ? "0%" : p < 0.0005 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;
// The square root separates 1% from 5% as well as 50% from 80%.
const shade = p => Math.sqrt(p).toFixed(2);

const cell = (p, ...children) => {
    const td = html("td", {class: "bar"}, ...children, percent(p));
    td.style.setProperty("--p", p.toFixed(4));
    return td;
};

// Write: a text, the candidates for each token, and the most likely tokens after each layer

let written = {checkpoint: "", prompt: "", tokens: []};
let chosen = 0;
let following = true;  // scroll to the end while the text grows, until the user chooses a token

function samplingOptions() {
    const value = id => byId(id).value;
    return {
        start: value("prompt"),
        temperature: value("temperature"),
        top_k: Number(value("top_k")) || (value("top_k") && "None"),
        top_p: Number(value("top_p")) === 1 ? "None" : value("top_p"),
        max_new_tokens: value("max_new_tokens"),
        seed: value("seed"),
    };
}

function describeSettings() {
    const {temperature, top_k, top_p} = samplingOptions();
    return `temperature ${temperature}` + (top_k === "None" ? "" : `, top-k ${top_k}`)
        + (top_p === "None" ? "" : `, top-p ${top_p}`);
}

const promptSpan = text => html("span", {class: "prompt"}, text);

const taken = token => token.candidates.find(candidate => candidate.taken);

function tokenSpan(token, number) {
    const p = taken(token).before;
    const span = html("span", {class: "token", title: percent(p), "data-token": number});
    span.style.setProperty("--shade", shade(p));
    token.text.split("\n").forEach((line, i) => {  // show a line end, so that it can be clicked
        if (i > 0) span.append(html("i", {}, "↵"), "\n");
        span.append(line);
    });
    return span;
}

function drawToken() {
    const token = written.tokens[chosen];
    for (const view of document.querySelectorAll(".token-view")) view.hidden = !token;
    if (!token) return;
    byId("choice").replaceChildren(
        `Token ${chosen + 1} is `, html("b", {}, taken(token).label), ". The candidates were:");
    byId("settings").textContent = token.settings;
    byId("candidates").replaceChildren(...token.candidates.map(c => html("tr",
        {class: c.taken ? "taken" : ""},
        html("td", {}, c.rank.toLocaleString("en")),
        html("th", {scope: "row"}, html("button", {"data-id": c.id}, c.label)),
        cell(c.before), cell(c.after))));
    byId("lens").replaceChildren(...token.lens.map((best, layer) => html("tr", {},
        html("th", {scope: "row"}, layer + 1),
        ...best.map(c => cell(c.p, html(c.taken ? "b" : "span", {class: "piece"}, c.label), " ")))));
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
}

// Write `count` tokens after the first `kept` tokens of the text; `choice`, an id, comes before them.
// Without these it is a new text. A `start` of null asks for the prompt of the run's own samples.
async function writeText({kept = 0, choice = null, count, start = byId("prompt").value} = {}) {
    const signal = beginTurn("write"), box = byId("text"), settings = describeSettings();
    following = true;
    if (kept === 0 && choice === null) {
        written = {checkpoint: byId("checkpoint").value, prompt: start, tokens: []};
        chosen = 0;
        box.replaceChildren();
        drawToken();
    }
    const {checkpoint, tokens} = written;
    const options = {...samplingOptions(), start: start ?? undefined};
    if (count) options.max_new_tokens = count;
    for (const span of [...box.querySelectorAll(".token")].slice(kept)) span.remove();
    tokens.length = kept;
    try {
        const request = {checkpoint, options, written: tokens.map(token => token.id), choice};
        let about = "";
        for await (const answer of ask("write", request, signal)) {
            if (answer.about) {
                show("about", about = answer.about);
                if (box.hasChildNodes()) continue;
                written.prompt = answer.prompt;
                if (start === null) byId("prompt").value = answer.prompt;
                box.append(promptSpan(answer.prompt));
                continue;
            }
            box.append(tokenSpan(answer, tokens.length));
            tokens.push({...answer, settings});
            if (tokens.length === kept + 1 || count === 1) choose(tokens.length - 1);
            if (following) box.scrollTop = box.scrollHeight;
        }
        const expected = kept + (choice !== null) + Number(options.max_new_tokens);
        if (!signal.aborted && tokens.length < expected)
            show("about", `${about}; the model ended the text here`);
    } catch (error) {
        report("about", error);
    }
}

// Go on with the text, or begin a new one if the prompt or the checkpoint is another one now.
function continueText(count) {
    const same = written.prompt === byId("prompt").value
        && written.checkpoint === byId("checkpoint").value;
    writeText({kept: same ? written.tokens.length : 0, count});
}

// Tokens: the pieces of the prompt

async function drawTokens() {
    const signal = beginTurn("tokens");
    const request = {checkpoint: byId("checkpoint").value, text: byId("prompt").value};
    try {
        for await (const {tokens, loss, count, characters} of ask("tokens", request, signal)) {
            const shown = tokens.length < count ? `; these are the first ${tokens.length}` : "";
            const mean = loss === null ? "" : ` Loss: ${loss.toFixed(3)} nats per token, the mean of `
                + "-ln(probability).";
            show("tokens-message", `${characters} character${characters === 1 ? "" : "s"}, ${count} `
                + `token${count === 1 ? "" : "s"}${shown}.${mean}`);
            byId("pieces").replaceChildren(...tokens.map(({id, label, p}) => {
                const piece = html("span", {class: p === null ? "piece" : "piece token"}, label);
                piece.style.setProperty("--shade", shade(p ?? 0));
                return html("li", {}, piece, html("small", {}, `id ${id}`),
                    html("small", {}, p === null ? "first" : percent(p)));
            }));
        }
    } catch (error) {
        if (error.name !== "AbortError") byId("pieces").replaceChildren();
        report("tokens-message", error);
    }
}

// Attention: which token looks at which

let seen = null;  // the last answer, with the maps of all heads
let head = [0, 0];  // the layer and the head that are large

function verdict(answer, what) {
    const [masked, unmasked] = answer.maps.map(map => map.loss);
    const losses = `Without the mask the loss goes from ${masked.toFixed(3)} to ${unmasked.toFixed(3)}`;
    const shown = answer.labels.length;
    const length = `${what} has ${answer.count.toLocaleString("en")} tokens`
        + (shown < answer.count ? `; the maps show the first ${shown}.` : ".");
    if (unmasked < masked / 2)
        return `${losses}, which is impossibly good. This model was trained without the mask: it copies `
            + `each answer from the next token, which does not exist when it writes. ${length}`;
    return `${losses}. A model that was trained with the mask never learned to use later tokens. A model `
        + "that was trained without it gets an impossibly low loss here: `python -m tools.lessons` "
        + `trains one in out/lessons/no_mask. ${length}`;
}

function heatMap({weights, masked}, labels) {
    const size = 16, T = labels.length;
    const names = labels.map(name => name.length <= 9 ? name : `${name.slice(0, 8)}…`);
    const longest = Math.max(...names.map(name => name.length));
    const margin = 26 + 7 * longest, side = margin + T * size + 1, end = side - 1;
    const steps = `M${margin} ${margin}${`h${size}v${size}`.repeat(T)}`;  // the future is above
    const map = svg("svg", {viewBox: `0 0 ${side} ${side}`, role: "img",
        "aria-label": `attention ${masked ? "with" : "without"} the mask`});
    map.style.minWidth = `${Math.round(0.75 * side)}px`;
    map.style.maxWidth = `${Math.round(1.5 * side)}px`;
    if (masked) map.append(svg("path", {class: "masked", d: `${steps}V${margin}Z`}));
    for (let row = 0; row < T; row++) {
        for (let column = 0; column < (masked ? row + 1 : T); column++) {
            const p = weights[row][column];
            map.append(svg("rect", {
                class: column > row ? "future" : "past", x: margin + column * size,
                y: margin + row * size, width: size, height: size, "fill-opacity": shade(p),
            }, svg("title", {}, `${names[row]} looks at ${names[column]}: ${percent(p)}`)));
        }
        const middle = margin + (row + 0.5) * size;
        const turned = {transform: `translate(${middle + 4} ${margin - 5}) rotate(-90)`};
        const upright = {x: middle, y: margin - 5, "text-anchor": "middle"};
        map.append(
            svg("text", {x: margin - 5, y: middle + 4, "text-anchor": "end"}, names[row]),
            svg("text", longest === 1 ? upright : turned, names[row]));
    }
    map.append(
        svg("path", {class: "stairs", d: steps}),
        svg("text", {class: "axis", x: margin, y: 11}, "looked at (keys) →"),
        svg("text", {class: "axis", transform: `translate(11 ${end}) rotate(-90)`}, "looking (queries) →"));
    if (masked && T > 12) map.append(
        svg("text", {class: "axis", x: end - 6, y: margin + 20, "text-anchor": "end"}, "the future, masked"));
    return map;
}

function figure({masked, loss, weights}, labels) {
    const [layer, number] = head;
    const map = {masked, weights: weights[layer][number].map(row => row.map(w => w / 10000))};
    const future = map.weights.flatMap((row, i) => row.slice(i + 1)).reduce((a, b) => a + b, 0);
    return html("figure", {}, html("figcaption", {},
        html("b", {}, `Layer ${layer + 1}, head ${number + 1}, ${masked ? "with" : "without"} the mask`),
        html("br"), `loss ${loss.toFixed(3)} nats per token, ${percent(future / labels.length)} of the `
            + "attention on the future"),
    html("div", {class: "scroll", tabindex: 0}, heatMap(map, labels)));
}

function thumbnail(weights, layer, number) {
    const T = weights.length, canvas = html("canvas", {width: T, height: T, "aria-hidden": true});
    const image = new ImageData(T, T), color = getComputedStyle(byId("heads")).color.match(/\d+/g);
    weights.flat().forEach((w, i) => image.data.set([...color, 255 * shade(w / 10000)], 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
    return html("button", {"data-head": [layer, number], "aria-pressed": false,
        title: `layer ${layer + 1}, head ${number + 1}`}, canvas);
}

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
    const text = both ? written.prompt + written.tokens.map(token => token.text).join("")
        : byId("prompt").value;
    const request = {checkpoint: byId("checkpoint").value, text, count: Number(byId("count").value)};
    try {
        for await (const answer of ask("attention", request, signal)) {
            seen = answer;
            show("verdict", verdict(answer, both ? "The prompt with the text" : "The prompt alone"));
            drawHeads();
        }
    } catch (error) {
        if (error.name === "AbortError") return;
        seen = null;
        drawHeads();
        report("verdict", error);
    }
}

// Compare: one prompt, several checkpoints

async function compareCheckpoints() {
    const signal = beginTurn("compare");
    const request = {options: samplingOptions(), written: [], choice: null};
    const paths = Array.from(byId("compared").querySelectorAll(":checked"), box => box.value);
    byId("cards").replaceChildren();
    show("compare-message", paths.length ? `with ${describeSettings()}` : "No checkpoint is chosen.",
        !paths.length);
    for (const checkpoint of paths) {
        if (signal.aborted) return;
        const about = html("p"), text = html("div", {class: "text"});
        byId("cards").append(html("article", {}, html("h2", {}, checkpoint), about, text));
        let number = 0;
        try {
            for await (const answer of ask("write", {...request, checkpoint}, signal)) {
                if (answer.candidates) text.append(tokenSpan(answer, number++));
                else {
                    about.textContent = answer.about;
                    text.append(promptSpan(answer.prompt));
                }
            }
        } catch (error) {
            about.id = "compare-error";
            report("compare-error", error);
            about.removeAttribute("id");
        }
    }
}

// Learning: the losses and the samples of a run

const CURVES = {loss: "batch", train_loss: "training", val_loss: "validation"};
const NO_LOG = {version: null, records: []};
let log = NO_LOG;
const samples = () => log.records.filter(record => record.sample !== null);
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
        [key, log.records.filter(r => r[key] !== null).map(r => [r.step, r[key]])]);
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
        const line = path.map(([step, loss]) => `${x(step)},${y(loss)}`).join(" ");
        plot.append(
            svg("polyline", {class: `curve ${key}`, points: line}),
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
        const record = log.records.find(r => r.step === step && r[key] !== null);
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
    const evaluated = log.records.findLast(r => r.val_loss !== null && r.step <= record.step);
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
                const record = log.records.findLast(r => r[key] !== null);
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

let known = "";

function offer(runs, newest) {
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
        return paths.map(path => {
            const box = html("input", {type: "checkbox", value: path});
            box.checked = boxes.get(path) ?? path === first;
            return html("label", {}, box, ` ${path}`);
        });
    });
    fieldset.replaceChildren(fieldset.querySelector("legend"), ...labels);
    if (!byId("run").options.length) {
        byId("run").append(...Object.keys(runs).map(run => html("option", {value: run}, run)));
        byId("run").value = newest;
    }
    if (!before) writeText({start: byId("prompt").value || null});
}

let refreshing = false;
async function refresh() {
    if (refreshing) return;
    refreshing = true;
    try {
        for await (const {runs, newest} of ask("runs", {})) {
            if (JSON.stringify(runs) !== known) offer(runs, newest);
            known = JSON.stringify(runs);
        }
        if (!byId("learning").hidden) await refreshLog();
    } catch (error) {
        report("notice", error);
        known = "";
    }
    refreshing = false;
}

// Draw what depends on the prompt and the checkpoint.
function redraw() {
    if (!byId("tokens").hidden) drawTokens();
    if (!byId("attention").hidden) drawAttention();
}

function openTab(name) {
    for (const tab of byId("tabs").children) {
        const open = tab.id === `tab-${name}`;
        tab.setAttribute("aria-selected", open);
        tab.tabIndex = open ? 0 : -1;
        byId(tab.getAttribute("aria-controls")).hidden = !open;
    }
    for (const control of document.querySelectorAll("[data-tabs]"))
        control.hidden = !control.dataset.tabs.split(" ").includes(name);
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
    const start = writeAnd(writeText);
    on("controls", "submit", event => event.preventDefault());
    on("write-start", "click", start);
    on("write-next", "click", writeAnd(() => continueText(1)));
    on("write-more", "click", writeAnd(continueText));
    on("candidates", "click", async event => {
        const id = event.target.closest("[data-id]")?.dataset.id;
        if (!id) return;
        await writeText({kept: chosen, choice: Number(id), count: 1, start: written.prompt});
        byId("candidates").querySelector("button")?.focus();  // the one that was clicked is gone
    });
    on("write-stop", "click", () => turns.write?.abort());
    on("compare-start", "click", compareCheckpoints);
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
        over("prompt");  // the written text continues another prompt
        redraw();
    });
    on("checkpoint", "change", redraw);
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
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHeads);
    openTab("write");
    refresh();
    setInterval(refresh, 1000);
}

connect();

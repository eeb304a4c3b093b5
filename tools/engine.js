"use strict";
// GPT-2 in plain JavaScript. In a file that tools.playground --to wrote, this runs in a worker and
// answers what tools/playground.py answers elsewhere. Names and letters are those of model.py: T tokens,
// C channels, nh heads with hs channels each. A matrix is a Float32Array, one row after the other.

// What a user can correct, in the words of the Python program.
class UserError extends Error {}

// Bytes are strings with one character of Latin-1 per byte, as in meta.json.
const toBytes = text => Array.from(new TextEncoder().encode(text), b => String.fromCharCode(b)).join("");
const byteArray = bytes => Uint8Array.from(bytes, c => c.charCodeAt(0));

// Return the text that token `next` completes after the tokens `before`, all as bytes.
function addedText(before, next) {
    const decoder = new TextDecoder("utf-8", {ignoreBOM: true});
    decoder.decode(byteArray(before.slice(-4).join("")), {stream: true});  // a character: 1 to 4 bytes
    return decoder.decode(byteArray(next), {stream: true});
}

const hex = (character, digits) => character.codePointAt(0).toString(16).padStart(digits, "0");

// Return a character as Python prints it inside a string.
function escaped(c) {
    const short = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}[c];
    if (short || c === " " || !/[\p{C}\p{Z}]/u.test(c)) return short ?? c;
    return c <= "\xff" ? `\\x${hex(c, 2)}` : c <= "\uffff" ? `\\u${hex(c, 4)}` : `\\U${hex(c, 8)}`;
}

// Return a text as Python's repr() does.
function repr(text) {
    const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
    return quote + Array.from(text, c => c === quote ? `\\${c}` : escaped(c)).join("") + quote;
}

// Return a token's text with signs for white space and escapes for what can not be printed.
function labelOf(bytes) {
    const decoder = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true});
    const signs = {" ": "␣", "\n": "↵", "\t": "⇥", "\\": "\\"};
    let label = "";
    for (let i = 0; i < bytes.length;) {
        let n = 1, c = null;
        for (; c === null && n <= 4; n++) {
            try { c = decoder.decode(byteArray(bytes.slice(i, i + n))); } catch { /* not a character */ }
        }
        label += c === null ? `\\x${hex(bytes[i], 2)}` : signs[c] ?? escaped(c);
        i += c === null ? 1 : n - 1;
    }
    return label;
}

class CharTokenizer {
    constructor({chars}) {
        this.chars = Array.from(chars);
        this.ids = new Map(this.chars.map((c, i) => [c, i]));
        this.bytes = this.chars.map(toBytes);
    }

    encode(text) {
        const characters = Array.from(text), unknown = characters.findIndex(c => !this.ids.has(c));
        if (unknown >= 0) throw new UserError(
            `${repr(characters.slice(0, 30).join(""))}: character ${repr(characters[unknown])} at position `
            + `${unknown} is not one of the ${this.chars.length} characters of this vocabulary: `
            + repr(this.chars.slice(0, 200).join("")));
        return characters.map(c => this.ids.get(c));
    }
}

class BPETokenizer {
    constructor({pattern, tokens}) {
        this.bytes = [...tokens, "<|endoftext|>"];
        this.endOfText = tokens.length;
        this.ids = new Map(tokens.map((token, i) => [token, i]));
        // JavaScript's own \s has a byte order mark, but not the control character U+0085.
        const spaces = {"\\s": "\\p{White_Space}", "\\S": "\\P{White_Space}"};
        this.pattern = new RegExp(pattern.replace(/\\[sS]/g, s => spaces[s]), "gu");
    }

    encode(text) {
        return text.split("<|endoftext|>").flatMap((part, i) => [
            ...(i > 0 ? [this.endOfText] : []),
            ...(part.match(this.pattern) ?? []).flatMap(word => this.merge(toBytes(word))),
        ]);
    }

    // Join the pair of parts that gives the lowest id, again and again.
    merge(word) {
        if (this.ids.has(word)) return [this.ids.get(word)];
        const parts = word.split(""), joined = i => this.ids.get(parts[i] + parts[i + 1]) ?? Infinity;
        const pairs = parts.slice(1).map((_, i) => joined(i));  // pairs[i]: the id of parts i and i + 1
        for (;;) {
            let best = 0;
            for (let i = 1; i < pairs.length; i++) if (pairs[i] < pairs[best]) best = i;
            if (!(pairs[best] < Infinity)) return parts.map(part => this.ids.get(part));
            parts.splice(best, 2, parts[best] + parts[best + 1]);
            pairs.splice(best, 1);
            if (best > 0) pairs[best - 1] = joined(best - 1);
            if (best < pairs.length) pairs[best] = joined(best);
        }
    }
}

// The model

// Return the product of each row of A with each row of B, rows of n numbers. Four rows with two others
// at a time read every number less often. Past the last row they read the last one again, and what
// they write past the end of an array is ignored.
function products(A, B, n) {
    const rows = A.length / n, columns = B.length / n, result = new Float32Array(rows * columns);
    const last = (rows - 1) * n;
    for (let row = 0; row < rows; row += 4) {
        const a = row * n, b = Math.min(a + n, last), c = Math.min(b + n, last), d = Math.min(c + n, last);
        for (let column = 0; column < columns; column += 2) {
            const e = column * n, f = Math.min(column + 1, columns - 1) * n;
            let ae = 0, be = 0, ce = 0, de = 0, af = 0, bf = 0, cf = 0, df = 0;
            for (let i = 0; i < n; i++) {
                const x = B[e + i], y = B[f + i];
                const p = A[a + i], q = A[b + i], r = A[c + i], s = A[d + i];
                ae += p * x;
                be += q * x;
                ce += r * x;
                de += s * x;
                af += p * y;
                bf += q * y;
                cf += r * y;
                df += s * y;
            }
            const at = row * columns + column;
            result[at] = ae;
            result[at + columns] = be;
            result[at + 2 * columns] = ce;
            result[at + 3 * columns] = de;
            if (column + 1 === columns) continue;
            result[at + 1] = af;
            result[at + columns + 1] = bf;
            result[at + 2 * columns + 1] = cf;
            result[at + 3 * columns + 1] = df;
        }
    }
    return result;
}

// Return W x + b for each row of x. One row is multiplied as if it was the matrix.
function linear(x, inputs, W, bias) {
    const y = x.length === inputs ? products(W, x, inputs) : products(x, W, inputs);
    if (bias) for (let i = 0; i < y.length; i++) y[i] += bias[i % bias.length];
    return y;
}

function layerNorm(x, weight, bias) {
    const C = weight.length, y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += C) {
        let mean = 0, variance = 0;
        for (let i = 0; i < C; i++) mean += x[start + i] / C;
        for (let i = 0; i < C; i++) variance += (x[start + i] - mean) ** 2 / C;
        const scale = 1 / Math.sqrt(variance + 1e-5);
        for (let i = 0; i < C; i++)
            y[start + i] = (x[start + i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
    }
    return y;
}

// (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)), which is faster.
const tanhGelu = x => x / (1 + Math.exp(-2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)));

// x times the share of a normal distribution below x: formula 7.1.26 of Abramowitz and Stegun 1964.
function exactGelu(x) {
    const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
    const factors = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
    const above = factors.reduce((sum, factor) => (sum * t + factor), 0) * t * Math.exp(-z * z) / 2;
    return x * (x > 0 ? 1 - above : above);
}

// Replace `count` values by their softmax.
function softmax(values, start = 0, count = values.length) {
    let largest = -Infinity, sum = 0;
    for (let i = start; i < start + count; i++) largest = Math.max(largest, values[i]);
    for (let i = start; i < start + count; i++) sum += values[i] = Math.exp(values[i] - largest);
    for (let i = start; i < start + count; i++) values[i] /= sum;
    return values;
}

// Return what T queries, those of the last T of S tokens, collect from the values, and the attention
// weights, (nh, T, S).
function attend(q, keys, values, T, S, C, nh, masked) {
    const hs = C / nh, y = new Float32Array(T * C), weights = new Float32Array(nh * T * S);
    for (let head = 0; head < nh; head++) {
        for (let t = 0; t < T; t++) {
            const seen = masked ? S - T + t + 1 : S, from = t * C + head * hs, row = (head * T + t) * S;
            for (let s = 0; s < seen; s++) {
                let score = 0;
                for (let i = 0, k = s * C + head * hs; i < hs; i++) score += q[from + i] * keys[k + i];
                weights[row + s] = score / Math.sqrt(hs);
            }
            softmax(weights, row, seen);
            for (let s = 0; s < seen; s++) {
                const w = weights[row + s], v = s * C + head * hs;
                for (let i = 0; i < hs; i++) y[from + i] += w * values[v + i];
            }
        }
    }
    return [y, weights];
}

const sum = (x, y) => x.map((value, i) => value + y[i]);

class GPT {
    constructor(config, tensors) {
        this.config = config;
        this.tensors = tensors;
        const head = tensors["lm_head.weight"] ?? tensors["transformer.wte.weight"];
        this.head = head.subarray(0, config.vocab_size * config.n_embd);  // without rows of padding
        const room = () => new Float32Array(config.block_size * config.n_embd);
        this.keys = Array.from({length: config.n_layer}, room);
        this.values = Array.from({length: config.n_layer}, room);
        this.ids = [];  // the tokens of these keys and values
    }

    // Return the logits of the last `rows` of S tokens, one row after the other. Keys and values of the
    // tokens that began the last call, too, are there already. `observe` is called with the number of
    // a layer and its values, as tools/playground.py names them.
    logits(ids, {rows = 1, masked = true, observe = () => {}} = {}) {
        const {n_embd: C, n_head: nh, n_layer} = this.config, S = ids.length;
        const gelu = this.config.gelu === "exact" ? exactGelu : tanhGelu;
        let past = 0;
        if (masked) while (past < S - rows && ids[past] === this.ids[past]) past++;
        if (!masked || past < S - rows || S > this.ids.length) this.ids = masked ? ids.slice() : [];
        let x = this.embed(ids, past);
        for (let layer = 0; layer < n_layer; layer++) {
            const w = name => this.tensors[`transformer.h.${layer}.${name}`];
            const norm = (x, name) => layerNorm(x, w(`${name}.weight`), w(`${name}.bias`));
            const project = (x, inputs, name) => linear(x, inputs, w(`${name}.weight`), w(`${name}.bias`));
            let normed = norm(x, "ln_1");
            const part = i => linear(normed, C, w("attn.c_attn.weight").subarray(i * C * C, (i + 1) * C * C),
                w("attn.c_attn.bias")?.subarray(i * C, (i + 1) * C));  // 0: q, 1: k, 2: v
            const keys = this.keys[layer], values = this.values[layer];
            keys.set(part(1), past * C);
            values.set(part(2), past * C);
            if (layer === n_layer - 1) [x, normed] = [x, normed].map(y => y.subarray(-rows * C));
            const input = x, T = x.length / C, q = part(0);
            const [y, weights] = attend(q, keys, values, T, S, C, nh, masked);
            const attention = project(y, C, "attn.c_proj"), middle = sum(input, attention);
            const hidden = project(norm(middle, "ln_2"), C, "mlp.c_fc").map(gelu);
            const mlp = project(hidden, 4 * C, "mlp.c_proj");
            x = sum(middle, mlp);
            const [k, v] = [keys, values].map(all => all.subarray((S - T) * C, S * C));
            observe(layer, {input, normed, q, k, v, weights, attention, hidden, mlp, output: x});
        }
        return this.read(x);
    }

    embed(ids, past) {
        const {"transformer.wte.weight": tokens, "transformer.wpe.weight": positions} = this.tensors;
        const C = this.config.n_embd, token = i => ids[past + Math.floor(i / C)];
        return Float32Array.from({length: (ids.length - past) * C}, (_, i) =>
            tokens[token(i) * C + i % C] + positions[past * C + i]);
    }

    // Return the logits that the final LayerNorm and the head read from the rows of x.
    read(x) {
        const w = name => this.tensors[`transformer.ln_f.${name}`];
        return linear(layerNorm(x, w("weight"), w("bias")), this.config.n_embd, this.head);
    }
}

// Return all token ids, the most likely first.
const ranked = logits => logits.map((_, i) => i).sort((a, b) => logits[b] - logits[a]);

// Return the probabilities with which tokens are drawn, for logits with the largest first. The
// options are those of sample.py; null for top_k and top_p lets all tokens pass.
function drawnWith(logits, {temperature, top_k, top_p}) {
    const count = temperature === 0 ? 1 : Math.min(top_k ?? logits.length, logits.length);
    const weights = softmax(Float64Array.from(logits.slice(0, count), x => (x - logits[0]) / (temperature || 1)));
    let before = 0, kept = 0;
    while (kept < count && before < (top_p ?? Infinity)) before += weights[kept++];
    return Array.from(logits, (_, i) => i < kept ? weights[i] / before : 0);
}

// Return a number in [0, 1) that depends on a seed and a number alone.
function random(seed, number) {
    let x = (Math.imul(seed, 0x9e3779b1) + Math.imul(number, 0x85ebca77)) | 0;
    for (const [shift, factor] of [[16, 0x7feb352d], [15, 0x846ca68b], [16, 1]])
        x = Math.imul(x ^ x >>> shift, factor);
    return (x >>> 0) / 2 ** 32;
}

// Return the tensors of a file, by name: base64 text with one after the other.
function readTensors(base64, shapes, dtype) {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
    let numbers = new (dtype === "float16" ? Uint16Array : Float32Array)(bytes.buffer);
    if (dtype === "float16") {
        const value = Float32Array.from({length: 65536}, (_, bits) => {
            const exponent = bits >> 10 & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
            return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
        });
        numbers = Float32Array.from(numbers, bits => value[bits]);
    }
    let end = 0;
    return Object.fromEntries(Object.entries(shapes).map(([name, shape]) =>
        [name, numbers.subarray(end, end += shape.reduce((a, b) => a * b))]));
}

// Return the last `count` rows of a matrix, each a copy of its own, in the columns of head `h` of nh.
const lastRows = (x, columns, count, h = 0, nh = 1) => Array.from({length: count}, (_, i) => {
    const start = x.length - (count - i) * columns, width = columns / nh;
    return x.slice(start + h * width, start + (h + 1) * width);
});

// Return the last `count` rows of the attention weights of head `h`, (nh, T, S).
const headRows = (weights, nh, h, S, count) =>
    lastRows(weights.subarray(0, (h + 1) * weights.length / nh), S, count);

// The answers to the page's requests, with the fields that tools/playground.py documents
class Engine {
    constructor({tokenizer, shapes, dtype, name, records, ...facts}, weights) {
        this.model = new GPT(facts.config, readTensors(weights, shapes, dtype));
        this.tokenizer = new {char: CharTokenizer, bpe: BPETokenizer}[tokenizer.kind](tokenizer);
        Object.assign(this, {name, records, facts});
    }

    *runs() { yield {runs: {[this.name]: [this.name]}, newest: this.name}; }

    *log({version}) { if (version !== 1) yield {version: 1, records: this.records}; }

    token = i => ({id: i, bytes: this.tokenizer.bytes[i]});

    encode(text, written = []) {
        if (!text) throw new UserError("the prompt is empty; a model can only continue a text");
        return [...this.tokenizer.encode(text), ...written];
    }

    *write({options, written}) {
        const {max_new_tokens, seed} = options, prompt = options.start ?? this.facts.start;
        const ids = this.encode(prompt, written), {block_size} = this.facts.config;
        yield {...this.facts, prompt, count: ids.length - written.length};
        for (let n = written.length; n < written.length + max_new_tokens; n++) {
            const logits = this.model.logits(ids.slice(-block_size)), order = ranked(logits);
            const drawn = drawnWith(Float32Array.from(order, i => logits[i]), options);
            let rest = random(seed, n);
            const rank = drawn.findIndex(p => (rest -= p) < 0), id = order[Math.max(rank, 0)];
            if (id === this.tokenizer.endOfText) return;
            yield {...this.token(id), p: softmax(logits)[id]};
            ids.push(id);
        }
    }

    *look({text, written, id, layer: chosen, head}) {
        const {block_size, n_embd: C, n_head: nh} = this.facts.config;
        const context = this.encode(text, written).slice(-block_size), S = context.length;
        const count = Math.min(8, S), rows = [], lens = [], values = {};
        const observe = (layer, seen) => {
            rows.push(Array.from({length: nh}, (_, h) => headRows(seen.weights, nh, h, S, 1)[0]));
            const logits = this.model.read(seen.output.subarray(-C)), best = ranked(logits).slice(0, 3);
            softmax(logits);
            lens.push(Array.from(best, i => ({...this.token(i), p: logits[i]})));
            if (layer === chosen) for (const [name, x] of Object.entries(seen))
                values[name] = name === "weights" ? headRows(x, nh, head, S, count)
                    : "qkv".includes(name) ? lastRows(x, C, count, head, nh)
                    : lastRows(x, name === "hidden" ? 4 * C : C, count);
        };
        const logits = lastRows(this.model.logits(context, {rows: count, observe}),
            this.facts.config.vocab_size, 1)[0];
        const order = ranked(logits), shown = [...new Set([...order.slice(0, 10), id])];
        const candidates = shown.map(i => ({...this.token(i), rank: order.indexOf(i) + 1}));
        yield {logits: Float32Array.from(order, i => logits[i]), candidates, lens, rows,
            context: context.map(this.token), values};
    }

    *read({text, written, count, masked, maps}) {
        const {block_size, n_head: nh, vocab_size: V} = this.facts.config, weights = [];
        const ids = this.encode(text, written);
        const shown = ids.slice(0, Math.max(1, Math.min(count, block_size))), T = shown.length;
        const observe = (_, seen) => maps && weights.push(
            Array.from({length: nh}, (_, h) => headRows(seen.weights, nh, h, T, T)));
        const logits = this.model.logits(shown, {rows: T, masked, observe});
        const losses = shown.slice(1).map((id, t) => -Math.log(softmax(logits, t * V, V)[t * V + id]));
        yield {tokens: shown.map(this.token), losses, weights, count: ids.length};
    }
}

// In a worker: answer requests, several at the same time if the page asks for them.
if (typeof document === "undefined") {
    let engine;
    onmessage = async ({data: {model, weights, action, fields, port}}) => {
        if (model) engine = new Engine(JSON.parse(model), weights);
        if (!action) return;
        let ended = false, last = performance.now();
        port.onmessage = () => { ended = true; };  // the page does not need the rest
        try {
            for (const answer of engine[action](fields)) {
                port.postMessage(answer);
                if (performance.now() < last + 30) continue;
                await new Promise(resolve => setTimeout(resolve));  // let other messages in
                if (ended) break;
                last = performance.now();
            }
        } catch (error) {
            port.postMessage({error: error.message});
        }
        port.postMessage(null);
    };
}

/* The model: it writes and measures in pieces, so that what the page asks next is heard soon. */
"use strict";

const PIECE_MS = 25;
const CHUNK = 32; // tokens of a measured text at a time
const ALTERNATIVES = 5;

let wasm, vocabSize, blockSize, ids, logits, rows;
let newest = 0; // the job that counts; an earlier one ends

/** Reserves integers in the module's memory: where they begin, in bytes. */
function reserve(count) {
  const at = wasm.web_reserve(4 * count);
  if (at === 0) throw new Error("the browser gives too little memory");
  return at;
}

function open({ program, weights, ...sizes }) {
  ({ vocabSize, blockSize } = sizes);
  wasm = new WebAssembly.Instance(new WebAssembly.Module(program)).exports;
  const file = reserve(weights.byteLength / 4 + 1);
  new Uint8Array(wasm.memory.buffer).set(new Uint8Array(weights), file);
  if (!wasm.web_open(file, weights.byteLength)) throw new Error("it computes other numbers than it should");
  const places = [reserve(blockSize + 1), wasm.web_logits(), reserve(CHUNK * vocabSize)];
  const lengths = [blockSize + 1, vocabSize, CHUNK * vocabSize]; // views are made last: memory that grows leaves them
  [ids, logits, rows] = places.map((at, index) => new Int32Array(wasm.memory.buffer, at, lengths[index]));
}

/** A list of tokens, each with its bits of surprise, and the likeliest tokens in its place with their probabilities. */
const newPiece = () => ({ tokens: [], bits: [], others: [], chances: [] });

/** Adds a token to a piece: its logits begin at `first`, with 10 fraction bits. */
function judge(piece, from, first, token) {
  let largest = -Infinity;
  let total = 0;
  const best = [];
  for (let id = 0; id < vocabSize; id++) {
    const logit = from[first + id];
    if (logit > largest) largest = logit;
    if (best.length < ALTERNATIVES || logit > from[first + best[best.length - 1]]) {
      if (best.length === ALTERNATIVES) best.pop();
      let place = best.length;
      while (place > 0 && from[first + best[place - 1]] < logit) place--;
      best.splice(place, 0, id);
    }
  }
  const power = (id) => Math.exp((from[first + id] - largest) / 1024);
  for (let id = 0; id < vocabSize; id++) total += power(id);
  piece.tokens.push(token);
  piece.bits.push(Math.log2(total) - ((from[first + token] - largest) / 1024) * Math.LOG2E);
  piece.others.push(best);
  piece.chances.push(best.map((id) => power(id) / total));
}

/** Lets waiting messages in; a timer would wait for milliseconds. */
const channel = new MessageChannel();
function breathe() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
}

async function write({ job, prompt, count, isGreedy, multiplier, topK, seed }) {
  const begin = performance.now();
  wasm.web_sample(isGreedy, multiplier, topK, seed);
  ids.set(prompt);
  let length = prompt.length;
  for (let index = 0; index < count && job === newest; ) {
    const piece = newPiece();
    const until = performance.now() + PIECE_MS;
    do {
      wasm.web_draw(ids.byteOffset, length, index++);
      const token = ids[length];
      judge(piece, logits, 0, token);
      ids[0] = token; // the model itself remembers what was before
      length = 1;
    } while (index < count && performance.now() < until);
    const seconds = (performance.now() - begin) / 1000;
    postMessage({ kind: "piece", job, piece, written: index, seconds, isLast: index === count });
    await breathe();
  }
}

async function measure({ job, text }) {
  const targets = text.length - 1;
  for (let first = 0; first < targets && job === newest; first += blockSize) {
    const piece = newPiece();
    const end = Math.min(first + blockSize, targets);
    for (let at = first; at < end; at += CHUNK) {
      const count = Math.min(CHUNK, end - at);
      ids.set(text.subarray(at, at + count));
      wasm.web_forward(ids.byteOffset, at - first, count, rows.byteOffset);
      for (let row = 0; row < count; row++) judge(piece, rows, row * vocabSize, text[at + row + 1]);
    }
    postMessage({ kind: "piece", job, piece, isLast: end === targets });
    await breathe();
  }
}

onmessage = ({ data }) => {
  if (data.kind === "open") {
    try {
      open(data);
      postMessage({ kind: "ready" });
    } catch (error) {
      postMessage({ kind: "failed", why: String(error.message || error) });
    }
    return;
  }
  newest = data.job;
  if (data.kind === "write") write(data);
  if (data.kind === "measure") measure(data);
};

"use strict";

const element = (id) => document.getElementById(id);
const known = JSON.parse(element("known").textContent);
const idOf = new Map(known.characters.map((character, id) => [character, id]));
const number = new Intl.NumberFormat("en");
const MOST_BITS = 8; // the strongest colour

/* ---- a text whose characters tell how surprising they were ---- */

const NAMES = { "\n": "line break", " ": "space", "\t": "tab" };
function named(character) {
  const shown = /\p{C}|\p{Z}/u.test(character) ? `U+${character.codePointAt(0).toString(16).padStart(4, "0")}` : character;
  return NAMES[character] || shown;
}
const percent = (chance) => (chance >= 0.0995 ? `${Math.round(100 * chance)} %` : `${(100 * chance).toFixed(1)} %`);

class Text {
  constructor(box) {
    this.box = box;
    this.clear();
    box.addEventListener("pointerover", ({ target }) => (target.at === undefined ? hide() : this.show(target.at)));
    box.addEventListener("pointerleave", ({ pointerType }) => pointerType === "mouse" && hide()); // a finger leaves at once
    box.addEventListener("blur", hide);
    box.addEventListener("keydown", (event) => {
      const last = this.characters.length - 1;
      const steps = { ArrowRight: this.current + 1, ArrowLeft: this.current - 1, Home: 0, End: last };
      if (event.key in steps && last >= 0) {
        event.preventDefault();
        this.show(Math.min(Math.max(steps[event.key], 0), last));
        element("announce").textContent = element("tip").innerText;
      }
    });
  }

  clear() {
    this.box.replaceChildren();
    this.box.hidden = true;
    this.line = null;
    this.characters = [];
    this.current = -1;
    this.bits = 0;
  }

  /** A line is a block of its own: what is added at the end leaves the others as they are drawn. */
  add(string, kind) {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = string;
    if (!this.line) this.box.append((this.line = document.createElement("div")));
    this.line.append(span);
    if (string.endsWith("\n")) this.line = null;
    this.box.hidden = false;
    return span;
  }

  addGuessed({ tokens, bits, others, chances }, at) {
    const span = this.add(known.characters[tokens[at]], "");
    span.at = this.characters.length;
    span.style.setProperty("--surprise", Math.min(bits[at] / MOST_BITS, 1).toFixed(2));
    this.characters.push({ span, token: tokens[at], bits: bits[at], others: others[at], chances: chances[at] });
    this.bits += bits[at];
  }

  show(at) {
    const { span, token, bits, others, chances } = this.characters[at];
    hide();
    this.current = at;
    span.classList.add("current");
    const tip = element("tip");
    const head = document.createElement("p");
    head.innerHTML = "<b></b> <span></span>";
    head.firstChild.textContent = named(known.characters[token]);
    head.lastChild.textContent = `${percent(2 ** -bits)}, ${bits.toFixed(2)} bits`;
    const list = document.createElement("ol");
    others.forEach((other, place) => {
      const item = document.createElement("li");
      item.innerHTML = "<span></span> <i></i> <span></span>";
      const [name, bar, chance] = item.children;
      name.textContent = named(known.characters[other]);
      bar.style.width = `${(100 * chances[place]).toFixed(1)}%`;
      chance.textContent = percent(chances[place]);
      item.classList.toggle("chosen", other === token);
      list.append(item);
    });
    tip.replaceChildren(head, list);
    tip.hidden = false;
    const place = [...span.getClientRects()].pop() || span.getBoundingClientRect();
    const below = place.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.top = `${below ? place.bottom + 8 : Math.max(place.top - 8 - tip.offsetHeight, 0)}px`;
    tip.style.left = `${Math.max(Math.min(place.left - 16, innerWidth - tip.offsetWidth - 8), 8)}px`;
  }
}

function hide() {
  element("tip").hidden = true;
  document.querySelector(".current")?.classList.remove("current");
}
addEventListener("scroll", hide, { passive: true });
addEventListener("pointerdown", ({ target }) => target.at === undefined && hide());
addEventListener("keydown", ({ key }) => key === "Escape" && hide());

/** The ids of a text's characters, and those that the model does not know: character -> how often. */
function encoded(string) {
  const unknown = new Map();
  const ids = [];
  for (const character of string) {
    if (idOf.has(character)) ids.push(idOf.get(character));
    else unknown.set(character, (unknown.get(character) || 0) + 1);
  }
  return { ids, unknown };
}
const listed = (unknown) => [...unknown].map(([character, times]) => `“${named(character)}” (${times}×)`).join(", ");

/* ---- the model, which works beside the page ---- */

const source = new Blob([element("worker").textContent], { type: "text/javascript" });
const worker = new Worker(URL.createObjectURL(source));
let job = 0; // what comes of an earlier one is left out
let onPiece = null; // of the job that runs

function begin(message, whenPiece) {
  job++;
  onPiece = whenPiece;
  worker.postMessage({ ...message, job });
}

function fail(why) {
  element("write-status").textContent = `The model does not run in this browser: ${why}.`;
}
worker.onerror = (event) => fail(event.message || "it could not be started");
worker.onmessage = ({ data }) => {
  if (data.kind === "ready") {
    for (const id of ["write-button", "measure-button"]) element(id).disabled = false;
    element("write-status").textContent = "";
  } else if (data.kind === "failed") fail(data.why);
  else if (data.job === job) onPiece(data);
};

function unpacked(id) {
  const bytes = Uint8Array.from(atob(element(id).textContent), (character) => character.charCodeAt(0));
  element(id).remove();
  return bytes.buffer;
}
const [program, weights] = ["program", "weights"].map(unpacked);
const sizes = { vocabSize: known.characters.length, blockSize: known.blockSize };
worker.postMessage({ kind: "open", program, weights, ...sizes }, [program, weights]);

/* ---- writing ---- */

const written = new Text(element("written"));
let isWriting = false;

/** The temperature as an integer: 131072 log2(e) / temperature, rounded, halves to even. */
function multiplierOf(temperature) {
  const quotient = (131072 * Math.LOG2E) / temperature;
  if (quotient >= 2 ** 32 - 1) return 2 ** 32 - 1;
  const below = Math.floor(quotient);
  return quotient - below === 0.5 ? below + (below % 2) : Math.round(quotient);
}

function stopWriting(words) {
  isWriting = false;
  element("write-button").textContent = "Write";
  element("write-status").textContent = words;
  element("speed").textContent = "";
}

element("temperature").addEventListener("input", ({ target }) => (element("degrees").value = target.value));
element("degrees").value = element("temperature").value;
element("write").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isWriting) {
    begin({ kind: "stop" }, null);
    stopWriting(`Stopped after ${number.format(written.characters.length)} characters.`);
    return;
  }
  const prompt = element("prompt").value || known.defaultPrompt;
  const { ids, unknown } = encoded(prompt);
  element("prompt").setAttribute("aria-invalid", unknown.size > 0);
  if (unknown.size) {
    element("write-status").textContent = `The model does not know ${listed(unknown)}. Please leave it out.`;
    element("prompt").focus();
    return;
  }
  const [temperature, topK, seed, count] = ["temperature", "top-k", "seed", "length"].map((id) => +element(id).value);
  hide();
  written.clear();
  written.add(prompt, "prompt");
  stopMeasuring();
  isWriting = true;
  element("write-button").textContent = "Stop";
  element("write-status").textContent = "Writing …";
  const isGreedy = temperature === 0;
  const multiplier = isGreedy ? 0 : multiplierOf(temperature);
  const message = { kind: "write", prompt: ids.slice(-known.blockSize), count, isGreedy, multiplier, topK, seed };
  begin(message, ({ piece, written: sofar, seconds, isLast }) => {
    piece.tokens.forEach((_, at) => written.addGuessed(piece, at));
    const speed = `${number.format(Math.round(sofar / seconds))} characters a second`;
    element("speed").textContent = speed;
    const bits = (written.bits / written.characters.length).toFixed(2);
    if (isLast) stopWriting(`${number.format(sofar)} characters, ${speed}, ${bits} bits each.`);
  });
});

/* ---- measuring ---- */

const measured = new Text(element("measured"));
element("blind").textContent = Math.log2(known.characters.length).toFixed(2);

function stopMeasuring() {
  if (element("measure-status").textContent === "Reading …") element("measure-status").textContent = "Stopped.";
}

element("measure").addEventListener("submit", (event) => {
  event.preventDefault();
  const { ids, unknown } = encoded(element("own").value);
  hide();
  measured.clear();
  element("bits").hidden = true;
  if (isWriting) stopWriting("Stopped.");
  if (ids.length < 2) {
    begin({ kind: "stop" }, null);
    element("measure-status").textContent = "Please give at least two characters that the model knows.";
    element("own").focus();
    return;
  }
  element("measure-status").textContent = "Reading …";
  const rest = [...element("own").value]; // the characters that are not shown yet
  const skip = () => {
    while (rest.length && !idOf.has(rest[0])) measured.add(rest.shift(), "unknown");
  };
  skip();
  measured.add(rest.shift(), "prompt");
  begin({ kind: "measure", text: Int32Array.from(ids) }, ({ piece, isLast }) => {
    piece.tokens.forEach((_, at) => {
      skip();
      rest.shift();
      measured.addGuessed(piece, at);
    });
    if (!isLast) return;
    skip();
    const count = measured.characters.length;
    element("bits").hidden = false;
    element("bits").firstChild.textContent = (measured.bits / count).toFixed(4);
    const skipped = unknown.size ? ` Skipped, as the model does not know them: ${listed(unknown)}.` : "";
    element("measure-status").textContent = `${number.format(count)} characters guessed.${skipped}`;
  });
});

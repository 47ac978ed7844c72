// The page: takes pictures by drop, paste, file or camera, and shows what the worker answers.

import { TEXTS, filled } from "./texts.js";

const $ = (id) => document.getElementById(id);
const settings = await (await fetch(new URL("page.json", import.meta.url))).json();
const asked = new URLSearchParams(location.search);
let language = asked.get("lang") in TEXTS ? asked.get("lang") : settings.language;
let state = { text: "starting" }; // a key of the texts, and its values
const entries = new Map(); // id → what a card shows
const TINY = 64; // pixels: a smaller picture is shown with sharp pixels

// The policy of the page holds in a worker from a blob, and not in one from an address.
const source = new Blob([`import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`], {
  type: "text/javascript",
});
const worker = new Worker(URL.createObjectURL(source), { type: "module" });
worker.onmessage = ({ data }) => {
  if (data.id !== undefined) finish(data);
  else if (data.ready) show({ text: "ready", ...data.ready, done: true });
  else if (data.failure) show({ text: "failed", reason: data.failure, done: true });
  else show({ text: "loading", bytes: data.loaded, of: data.total });
};
worker.onerror = (event) => show({ text: "failed", reason: event.message ?? "", done: true });
worker.postMessage({ engine: asked.get("engine") });

// What is shown

function show(next) {
  state = next;
  translate();
}

function translate() {
  const texts = TEXTS[language];
  document.documentElement.lang = texts.locale;
  document.title = `${settings.name} · CvT`;
  for (const id of ["heading", "privacy", "drop", "choose", "camera", "take", "close"]) {
    $(id).textContent = texts[id];
  }
  const [before, after] = texts[settings.problem === "values" ? "lead_values" : "lead"].split("{name}");
  const name = Object.assign(document.createElement("strong"), { textContent: settings.name });
  $("lead").replaceChildren(before, name, after);
  $("lead").className = "";
  $("results-heading").textContent = texts.results;
  $("language").textContent = texts.other[1];
  $("language").lang = TEXTS[texts.other[0]].locale;
  $("input").hidden = $("language").hidden = false;
  showState(texts);
  for (const entry of entries.values()) fill(entry, texts);
}

function showState(texts) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  const { text, engine, bytes, of, ...values } = state;
  const loading = { loaded: megabytes(bytes), total: megabytes(of) };
  const whole = text === "loading" && bytes === of;
  const shown = whole ? texts.starting : engine ? texts[text][engine] : texts[text];
  $("state").textContent = filled(shown, { ...values, ...loading });
  $("state").className = text;
  $("progress").hidden = Boolean(state.done);
  if (bytes === undefined || whole) $("progress").removeAttribute("value");
  else $("progress").value = bytes / of;
}

$("language").onclick = () => {
  language = TEXTS[language].other[0];
  translate();
};

// Pictures and their cards

let count = 0;

/** A card of a picture that has no answer yet: its number, and its place for the picture. */
function added(name) {
  const id = count++;
  const card = $("result").content.cloneNode(true).firstElementChild;
  card.querySelector("h3").textContent = name;
  $("results-section").hidden = false;
  $("results").prepend(card);
  const entry = { card, answer: null };
  entries.set(id, entry);
  fill(entry, TEXTS[language]);
  return [id, card.querySelector("img")];
}

function give(files) {
  for (const file of files) {
    const [id, image] = added(file.name);
    image.src = URL.createObjectURL(file);
    image.onload = () => {
      image.classList.toggle("tiny", image.naturalWidth < TINY);
      URL.revokeObjectURL(image.src);
    };
    image.onerror = () => image.remove(); // the browser cannot show it
    worker.postMessage({ id, file });
  }
}

function finish({ id, ...answer }) {
  const entry = entries.get(id);
  entry.answer = answer;
  fill(entry, TEXTS[language]);
}

function fill({ card, answer }, texts) {
  const [note, list, time] = [".note", ".classes", ".time"].map((name) => card.querySelector(name));
  const refusal = answer?.refusal;
  card.classList.toggle("failed", Boolean(answer && !answer.classes));
  if (!answer) note.textContent = texts.waiting;
  else if (refusal) note.textContent = filled(texts.refusals[refusal.reason], refusal.values);
  else note.textContent = answer.failure ?? "";
  if (!answer?.classes) return;
  list.replaceChildren(...answer.classes.map((each) => row(each, texts)));
  const { prepare, model } = answer.seconds;
  const figures = { total: prepare + model, prepare, model };
  for (const name in figures) figures[name] = number(figures[name], { maximumFractionDigits: 2 });
  time.textContent = filled(texts.time, figures);
}

function row({ label, score, has }, texts) {
  const item = document.createElement("li");
  const values = settings.problem === "values";
  if (!values) {
    const bar = Object.assign(document.createElement("div"), { className: "bar" });
    bar.style.width = `${100 * score}%`;
    item.append(bar);
  }
  const name = Object.assign(document.createElement("span"), { textContent: label });
  if (has) {
    const mark = { className: "has", textContent: texts.has };
    name.append(Object.assign(document.createElement("span"), mark));
  }
  const how = values
    ? { maximumSignificantDigits: 5 }
    : { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 };
  const shown = { className: "score", textContent: number(score, how) };
  item.append(name, Object.assign(document.createElement("span"), shown));
  return item;
}

const number = (value, how) => value.toLocaleString(TEXTS[language].locale, how);

$("files").onchange = ({ target }) => {
  give(target.files);
  target.value = ""; // the same file can be chosen again
};
document.onpaste = ({ clipboardData }) => give(clipboardData.files);
document.ondragover = (event) => {
  event.preventDefault();
  $("input").classList.add("over");
};
document.ondragleave = ({ relatedTarget }) => {
  if (!relatedTarget) $("input").classList.remove("over");
};
document.ondrop = (event) => {
  event.preventDefault();
  $("input").classList.remove("over");
  give(event.dataTransfer.files);
};

// The camera

let photos = 0;
$("camera").hidden = !navigator.mediaDevices?.getUserMedia; // it needs https or this machine

$("camera").onclick = async () => {
  try {
    const wanted = { video: { facingMode: "environment", width: { ideal: 1280 } } };
    $("video").srcObject = await navigator.mediaDevices.getUserMedia(wanted);
    await $("video").play(); // until there is a picture to take
  } catch (error) {
    show({ text: "no_camera", reason: error.message, done: state.done });
    return;
  }
  $("camera-dialog").showModal();
};

$("take").onclick = async () => {
  const video = $("video");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const photo = await canvas.convertToBlob({ type: "image/png" });
  const name = filled(TEXTS[language].photo, { number: ++photos });
  $("camera-dialog").close();
  give([new File([photo], name, { type: photo.type })]);
};

$("close").onclick = () => $("camera-dialog").close();
$("camera-dialog").onclose = () => {
  for (const track of $("video").srcObject.getTracks()) track.stop();
  $("video").srcObject = null;
};

translate();

// ?image=photo.jpg shows a picture of this server at once
for (const address of asked.getAll("image")) {
  const name = address.split("/").pop();
  try {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    give([new File([await answer.blob()], name)]);
  } catch (error) {
    const [id, image] = added(name);
    image.remove();
    finish({ id, failure: `${address}: ${error.message}` });
  }
}

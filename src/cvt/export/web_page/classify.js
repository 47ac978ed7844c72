// The model in ONNX Runtime Web: a picture file in, classes and scores out.

import { decode, Refusal } from "./decode.js";
import { preprocess } from "./preprocessing.js";

const RUNTIME = new URL("./runtime/", import.meta.url);
const MOST_THREADS = 8;
const TOP = 5;
const ENGINES = {
  webgpu: ["ort.webgpu.min.js", "ort-wasm-simd-threaded.asyncify"],
  wasm: ["ort.wasm.min.js", "ort-wasm-simd-threaded"],
};

/**
 * Load the model.
 *
 * @param {?string} wanted "webgpu" or "wasm"; by default what the machine has
 * @param {function(number, number)} progress called with the bytes that are loaded, and all
 */
export async function open(wanted, progress) {
  const settings = await (await fetched("page.json")).json();
  const graph = await download(settings.graph, settings.graph_bytes, progress);
  if (wanted === "webgpu" || (wanted !== "wasm" && (await hasGpu(settings.precision)))) {
    try {
      const model = new Model(settings, "webgpu", await session("webgpu", graph));
      if (await model.answersRightly()) return model;
      console.warn("WebGPU computes other numbers than the model's; WebAssembly is used");
    } catch (error) {
      console.warn("WebGPU cannot run the model; WebAssembly is used:", error);
    }
  }
  return new Model(settings, "wasm", await session("wasm", graph));
}

async function fetched(name) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer;
}

async function download(name, total, progress) {
  const graph = new Uint8Array(total);
  const reader = (await fetched(name)).body.getReader();
  let loaded = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (loaded + part.value.length > total) break;
    graph.set(part.value, loaded);
    loaded += part.value.length;
    progress(loaded, total);
  }
  if (loaded !== total) throw new Error(`${name}: has not the ${total} bytes of page.json`);
  return graph;
}

/** Whether there is a GPU that computes in the precision; a processor that imitates one is slower. */
async function hasGpu(precision) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter || adapter.info?.isFallbackAdapter || precision === "int8") return false;
  return precision !== "fp16" || adapter.features.has("shader-f16");
}

async function session(engine, graph) {
  const [library, binary] = ENGINES[engine];
  const ort = await import(new URL(library, RUNTIME));
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = self.crossOriginIsolated
    ? Math.min(navigator.hardwareConcurrency, MOST_THREADS)
    : 1;
  ort.env.wasm.wasmPaths = {
    mjs: new URL(`${binary}.js`, RUNTIME).href,
    wasm: new URL(`${binary}.wasm`, RUNTIME).href,
  };
  const opened = await ort.InferenceSession.create(graph, { executionProviders: [engine] });
  const threads = ort.env.wasm.numThreads;
  let last = Promise.resolve(); // for WebGPU the runtime keeps a single call that waits
  const run = async (pixels, height, width) => {
    const tensor = new ort.Tensor("float32", pixels, [1, 3, height, width]);
    const compute = () => opened.run({ pixel_values: tensor });
    last = last.then(compute, compute);
    return (await last).logits.data;
  };
  return { run, threads };
}

export class Model {
  constructor(settings, engine, { run, threads }) {
    this.settings = settings;
    this.engine = engine;
    this.threads = threads;
    this.run = run;
  }

  /** Whether the logits of a fixed pattern are those that the model had in Python. */
  async answersRightly() {
    const { example, precision, preprocessing } = this.settings;
    const side = preprocessing.image_size;
    const pattern = Float32Array.from({ length: 3 * side * side }, (_, i) => (i % 251) / 125 - 1);
    const logits = await this.run(pattern, side, side);
    const share = precision === "fp32" ? 0.001 : 0.02;
    const accepted = share * Math.max(...example.map(Math.abs), 0.1);
    return example.every((expected, i) => Math.abs(logits[i] - expected) <= accepted);
  }

  /** The logits of a picture file, and the seconds that decoding and the model took. */
  async logits(file) {
    const start = performance.now();
    const { width, height, pixels } = preprocess(await decode(file), this.settings.preprocessing);
    const prepared = performance.now();
    const logits = await this.run(pixels, height, width);
    const end = performance.now();
    return { logits, prepare: (prepared - start) / 1000, model: (end - prepared) / 1000 };
  }

  /** The best classes of a picture file, as cvt.Classifier gives them, and the seconds. */
  async classify(file) {
    const { logits, ...seconds } = await this.logits(file);
    if (!logits.every(Number.isFinite)) throw new Refusal("not_finite");
    return { classes: ranked(logits, this.settings), seconds };
  }
}

/**
 * Label and score of the best classes, the best first; of a regression all values, the largest
 * first. Where the model has thresholds, the classes that reach theirs come first.
 */
export function ranked(logits, { labels, problem, thresholds }) {
  const found = scores(logits, problem);
  const has = (i) => thresholds !== null && found[i] >= thresholds[i];
  const order = labels.map((_, i) => i);
  order.sort((i, j) => has(j) - has(i) || logits[j] - logits[i] || i - j);
  return order.slice(0, problem === "values" ? labels.length : TOP).map((i) => ({
    label: labels[i],
    score: found[i],
    has: thresholds === null ? null : has(i),
  }));
}

function scores(logits, problem) {
  const values = Array.from(logits);
  if (problem === "values") return values;
  if (problem === "independent") return values.map((logit) => 1 / (1 + Math.exp(-logit)));
  const largest = Math.max(...values);
  const powers = values.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

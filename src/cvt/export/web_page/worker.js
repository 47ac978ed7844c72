// Decodes and computes beside the page, which stays responsive. The page's policy holds here too,
// because the page starts this file from a blob.

import { open } from "./classify.js";
import { Refusal } from "./decode.js";

let model;

self.onmessage = async ({ data: { id, file, engine } }) => {
  try {
    model ??= open(engine, (loaded, total) => self.postMessage({ loaded, total }));
    if (id === undefined) {
      const { engine, threads } = await model;
      self.postMessage({ ready: { engine, threads } });
    } else {
      self.postMessage({ id, ...(await (await model).classify(file)) });
    }
  } catch (error) {
    if (error instanceof Refusal) {
      self.postMessage({ id, refusal: { reason: error.reason, values: error.values } });
    } else {
      console.error(error);
      self.postMessage({ id, failure: String(error?.message ?? error) });
    }
  }
};

// All texts of the page. Names in braces are filled in.

const FORMATS = "JPEG, PNG, WebP, AVIF, GIF, BMP";

export const TEXTS = {
  en: {
    locale: "en",
    other: ["zh", "中文"],
    heading: "What is in the picture?",
    lead: "Give {name} a picture: it names the classes.",
    lead_values: "Give {name} a picture: it estimates the values.",
    privacy: "The model runs in this page. Your pictures do not leave your device.",
    drop: "Drop or paste pictures here",
    choose: "Choose pictures",
    camera: "Camera",
    take: "Take picture",
    close: "Close",
    no_camera: "The camera cannot be used: {reason}",
    photo: "camera {number}",
    loading: "Loading the model: {loaded} of {total} MB",
    starting: "Starting the model …",
    ready: { webgpu: "Ready (WebGPU)", wasm: "Ready (WebAssembly, threads: {threads})" },
    failed: "The model cannot be loaded: {reason}",
    waiting: "In the queue …",
    results: "Results",
    time: "{total} s: {prepare} s to read the picture, {model} s for the model",
    has: "present",
    refusals: {
      empty: "The file is empty.",
      unknown: `This is not a picture in one of the formats ${FORMATS}.`,
      undecodable:
        `This {kind} cannot be decoded: it is damaged, or this browser does not support {kind}. Pictures in ${FORMATS} can be used.`,
      pixels: "The picture has {width} × {height} pixels, which is too many.",
      aspect: "The picture has {width} × {height} pixels: it is too long for its width.",
      size: "The picture has {width} × {height} pixels; this model takes {side} × {side} only.",
      not_finite: "The model has no finite scores for this picture.",
    },
  },
  zh: {
    locale: "zh-CN",
    other: ["en", "English"],
    heading: "图片里有什么？",
    lead: "给 {name} 一张图片，它会给出类别。",
    lead_values: "给 {name} 一张图片，它会估计数值。",
    privacy: "模型在本页面中运行，你的图片不会离开你的设备。",
    drop: "把图片拖到或粘贴到这里",
    choose: "选择图片",
    camera: "相机",
    take: "拍照",
    close: "关闭",
    no_camera: "无法使用相机：{reason}",
    photo: "相机 {number}",
    loading: "正在加载模型：{loaded} / {total} MB",
    starting: "正在启动模型……",
    ready: { webgpu: "已就绪（WebGPU）", wasm: "已就绪（WebAssembly，线程数：{threads}）" },
    failed: "无法加载模型：{reason}",
    waiting: "排队中……",
    results: "结果",
    time: "{total} 秒：读取图片 {prepare} 秒，模型 {model} 秒",
    has: "有",
    refusals: {
      empty: "文件是空的。",
      unknown: `这不是 ${FORMATS} 格式的图片。`,
      undecodable: `无法解码这个 {kind} 文件：它已损坏，或者浏览器不支持 {kind}。可以使用 ${FORMATS} 格式的图片。`,
      pixels: "图片有 {width} × {height} 像素，太大了。",
      aspect: "图片有 {width} × {height} 像素，过于细长。",
      size: "图片有 {width} × {height} 像素，而这个模型只接受 {side} × {side}。",
      not_finite: "模型对这张图片给出的分数不是有限数。",
    },
  },
};

/** A text with its names filled in. */
export const filled = (text, values) =>
  text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");

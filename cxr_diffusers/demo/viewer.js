// The three images, with the map over the input. `element`, `props` and `watch` are Gradio's (gr.HTML, js_on_load).
// The map is a PNG of two bytes a value, so the sliders work in the browser, without the server.
// `window.cxrView` outlives the element, which is removed during a run: opacity and factor are those of the sliders.
const view = (window.cxrView = { opacity: 0.8, factor: 1, ...window.cxrView, layers: null });

async function pixels(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

async function load() {
  const data = JSON.parse(props.value || "null");
  const panels = element.querySelector(".panels");
  panels.dataset.state = data ? "answer" : "empty";
  if (!data) { view.layers = null; return; }
  const [grey, map] = [await pixels(data.input), await pixels(data.map)];
  const values = new Float32Array(map.width * map.height);
  for (let p = 0; p < values.length; p++) values[p] = (map.data[4 * p] * 256 + map.data[4 * p + 1]) / 65535;
  view.layers = { grey, values, vmax: data.vmax, unit: data.threshold, colours: data.colours };
  element.querySelector(".input img").src = data.input;
  const healthy = element.querySelector(".healthy");
  healthy.classList.toggle("none", !data.counterfactual);
  if (data.counterfactual) healthy.querySelector("img").src = data.counterfactual;
  element.querySelector(".bar .high").textContent = "\u2265 " + data.vmax.toPrecision(2);
  element.querySelector(".bar .middle").textContent = (data.vmax / 2).toPrecision(2);
  view.draw();
}

function outlined(values, width, height, x, y, threshold) {
  const [r, p] = [Math.max(1, Math.round(width / 300)), y * width + x];  // about two pixels on the screen
  return (x >= r && !(values[p - r] > threshold)) || (x < width - r && !(values[p + r] > threshold))
    || (y >= r && !(values[p - r * width] > threshold)) || (y < height - r && !(values[p + r * width] > threshold));
}

view.draw = () => {
  if (!view.layers) return;
  const { grey, values, vmax, unit, colours } = view.layers;
  const opacity = view.opacity, threshold = view.factor * unit;
  const [width, height] = [grey.width, grey.height];
  const canvas = element.querySelector("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const out = context.createImageData(width, height);
  let above = 0;
  for (let y = 0, p = 0; y < height; y++) {
    for (let x = 0; x < width; x++, p++) {
      const value = values[p], inside = value > threshold, level = Math.min(value / vmax, 1);
      const alpha = inside ? opacity * level ** 0.8 : 0, c = 3 * Math.round(level * 255), q = 4 * p;
      above += inside;
      for (let k = 0; k < 3; k++) out.data[q + k] = grey.data[q + k] * (1 - alpha) + colours[c + k] * alpha;
      out.data[q + 3] = 255;
      // the outline of the mask: its pixels next to others outside it; none at the border of the image
      if (inside && outlined(values, width, height, x, y, threshold)) out.data.fill(255, q, q + 3);
    }
  }
  context.putImageData(out, 0, 0);
  const bar = element.querySelector(".bar i");
  const stops = [0, 0.25, 0.5, 0.75, 1].map((s) => {
    const [c, a] = [3 * Math.round(s * 255), opacity * s ** 0.8];
    return `rgb(${[0, 1, 2].map((k) => Math.round(90 * (1 - a) + colours[c + k] * a))}) ${100 * s}%`;
  });
  bar.style.background = `linear-gradient(to right, ${stops})`;
  const share = (100 * above) / values.length;
  element.querySelector(".above").textContent = above
    ? `${share.toFixed(1)} % of the image above ${threshold.toFixed(3)}`
    : `nothing above ${threshold.toFixed(3)}: lower the threshold to see what is weaker`;
  canvas.dataset.above = above;
};

watch("value", load);
load();

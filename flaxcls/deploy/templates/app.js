"use strict";
// The page of --mode=app. What comes from the server, class names too, is put in as text alone.

const METHODS = {
  cam: "CAM",
  grad_cam: "Grad-CAM",
  grad_cam_pp: "Grad-CAM++",
  attention: "attention",
  occlusion: "occlusion",
};
const FEWEST = 3, MOST = 20;
const $ = (id) => document.getElementById(id);

const state = {
  runs: [],
  largest: 0,
  picture: null, // the file that is looked at
  asked: 0, // number of the newest question: an older one's answer is not shown
  examples: [], // {file, square, refused}
  prepared: 0, // as `asked`, of the examples
  teaching: false,
};

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function percent(share) {
  if (share === null) return "n/a";
  return share > 0 && share < 0.0005 ? "<\u00a00.1\u00a0%" : `${(100 * share).toFixed(1)}\u00a0%`;
}

const took = (seconds) => (seconds < 1 ? `${Math.round(1000 * seconds)}\u00a0ms` : `${seconds.toFixed(1)}\u00a0s`);

class Refused extends Error {}

async function ask(path, body) {
  let response, answer;
  try {
    response = await fetch(path, body === undefined ? {} : { method: "POST", body });
    answer = await response.json();
  } catch {
    throw new Refused("flaxcls does not answer; see whether it still runs in its terminal");
  }
  if (answer.refused) throw new Refused(answer.refused);
  return answer;
}

function say(id, sentence) {
  $(id).textContent = sentence ? sentence[0].toUpperCase() + sentence.slice(1) + "." : "";
  $(id).hidden = !sentence;
}

// Runs

async function readRuns() {
  const answer = await ask("/api/runs");
  state.runs = answer.runs;
  state.largest = answer.largest;
}

function fill(select, options, chosen) {
  select.replaceChildren(
    ...options.map(([value, text]) => element("option", { value, textContent: text })),
  );
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

function showRuns(chosen, compared) {
  const names = state.runs.map((run, number) => [String(number), run.name]);
  fill($("run"), names, String(chosen));
  fill($("compare"), [["", "no other run"], ...names], compared === null ? "" : String(compared));
  $("compare-field").hidden = state.runs.length < 2;
  showRun();
}

const chosenRun = () => state.runs[Number($("run").value)];

function showRun() {
  const run = chosenRun();
  const facts = [
    run.model,
    `${run.classes.length} classes`,
    `${run.size} × ${run.size} ${run.grey ? "grey" : "colour"}`,
  ];
  if (run.accuracy !== undefined && run.accuracy !== null) facts.push(`${percent(run.accuracy)} of test images right`);
  if (run.origin) facts.push(`taught from ${run.origin}`);
  $("facts").textContent = `${run.name}: ${facts.join(", ")}`;
  const wanted = $("class").selectedOptions[0]?.textContent;
  const classes = run.classes.map((name, number) => [String(number), name]);
  fill($("class"), [["", "the likeliest"], ...classes], String(run.classes.indexOf(wanted)));
  const methods = run.methods.map((method) => [method, METHODS[method] ?? method]);
  fill($("method"), [["auto", `the best: ${methods[0][1]}`], ...methods], $("method").value);
  $("teach-run").textContent = run.name;
  showWays(run);
  $("parent-field").hidden = !run.parents.length;
  fill($("parent"), run.parents.map((name) => [name, name]), $("parent").value);
}

function showWays(run) {
  const [imprint, finetune] = document.querySelectorAll("input[name=way]");
  imprint.disabled = !run.imprints;
  if (!run.imprints) finetune.checked = true;
  $("imprint-note").textContent = run.imprints
    ? "adds what the photos have in common to the last layer; all else stays, bit for bit"
    : "not for this run, whose logits are the product of two layers";
}

// Looking at a picture

function choosePicture(file) {
  if (!file) return;
  if (file.size > state.largest) {
    say("trouble", `the file has ${Math.round(file.size / 2 ** 20)} MB, more than the ${state.largest / 2 ** 20} MB that the page takes; make it smaller`);
    return;
  }
  state.picture = file;
  $("example-above").disabled = false;
  look();
}

async function look() {
  if (!state.picture) return;
  const asked = ++state.asked;
  const numbers = [$("run").value];
  if ($("compare").value && $("compare").value !== $("run").value) numbers.push($("compare").value);
  $("results").classList.add("waiting");
  $("results").setAttribute("aria-busy", "true");
  let shown, trouble = "";
  try {
    const answers = await Promise.all(
      numbers.map((number) => ask(`/api/look?${question(Number(number))}`, state.picture)),
    );
    shown = answers.map((answer, i) => answerCard(state.runs[Number(numbers[i])], answer));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    trouble = error.message;
  }
  if (asked !== state.asked) return;
  say("trouble", trouble);
  if (shown) $("results").replaceChildren(element("div", { className: "answers" }, ...shown));
  $("results").classList.remove("waiting");
  $("results").removeAttribute("aria-busy");
}

function question(number) {
  const run = state.runs[number];
  const asks = new URLSearchParams({ run: number, invert: $("invert").value });
  if (run.methods.includes($("method").value)) asks.set("method", $("method").value);
  // Of another run the class of the same name; where it has none, its likeliest.
  if ($("class").value) {
    const wanted = run.classes.indexOf(chosenRun().classes[Number($("class").value)]);
    if (wanted >= 0) asks.set("class", wanted);
  }
  return asks;
}

function answerCard(run, answer) {
  const best = answer.top[0];
  const says = element("p", { className: "says" }, `${best.name} `);
  says.append(element("span", { className: "share", textContent: percent(best.share) }));
  const shares = element("div", {}, bars(answer.top));
  if (answer.parents.length) {
    shares.prepend(element("p", { className: "bars-title", textContent: "Class" }));
    shares.append(element("p", { className: "bars-title", textContent: "Parent" }), bars(answer.parents));
  }
  return element(
    "article", { className: "answer" },
    element("p", { className: "of", textContent: run.name }),
    says,
    pictures(answer),
    shares,
    whatItSaw(run, answer),
  );
}

function pictures(answer) {
  const { name, method, nothing, share } = answer.explained;
  const called = METHODS[method] ?? method;
  let caption = `Speaks for ${name}, ${percent(share)} (${called})`;
  if (method === "attention") caption = "Where the model looks (attention)";
  if (nothing) caption = `Nothing speaks for ${name}, ${percent(share)} (${called})`;
  return element(
    "div", { className: "pictures" },
    figure(answer.photo, "The picture", "The picture"),
    figure(answer.overlay, caption, "Heat map on the picture"),
  );
}

function figure(source, caption, alt) {
  return element(
    "figure", {},
    element("img", { src: source, alt }),
    element("figcaption", { textContent: caption }),
  );
}

function bars(shares) {
  const rows = shares.map(({ name, share }) => {
    const bar = element("span");
    bar.style.width = `${100 * (share ?? 0)}%`;
    return element(
      "li", {},
      element("span", { className: "name", textContent: name, title: name }),
      element("span", { className: "bar" }, bar),
      element("span", { className: "n", textContent: percent(share) }),
    );
  });
  return element("ol", { className: "bars" }, ...rows);
}

function whatItSaw(run, answer) {
  let sentence = `What the model was given: ${run.size} × ${run.size} pixels`;
  if (answer.inverted) {
    sentence += $("invert").value === "yes"
      ? ", light and dark swapped"
      : ", light and dark swapped, as the run was trained on light things on dark ground";
  }
  return element(
    "div", { className: "saw" },
    element("img", { src: answer.square, alt: "What the model was given", className: "pixels" }),
    element("span", { textContent: `${sentence}. It took ${took(answer.seconds)}.` }),
  );
}

// Where pictures come from

class Camera {
  constructor(video, button, note) {
    Object.assign(this, { video, button, note, stream: null });
  }

  async start() {
    this.wanted = true;
    this.note.textContent = "The camera starts …";
    let stream;
    try {
      if (!navigator.mediaDevices) throw new DOMException("", "SecurityError");
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
      if (!this.wanted) return stop(stream);
      this.stop();
      this.wanted = true;
      this.stream = stream;
      this.video.srcObject = stream;
      await this.video.play();
      this.video.style.aspectRatio = `${this.video.videoWidth} / ${this.video.videoHeight}`;
      this.button.disabled = false;
      this.note.textContent = "";
    } catch (error) {
      if (!this.wanted) return; // Stopped while it started.
      this.note.textContent = {
        NotAllowedError: "The browser does not give the camera to this page; allow it there.",
        NotFoundError: "There is no camera; connect one, or choose a photo.",
        SecurityError: "The browser gives cameras only to pages at 127.0.0.1 or localhost.",
      }[error.name] ?? "The camera does not start; see whether another program uses it.";
    }
  }

  stop() {
    this.wanted = false;
    stop(this.stream);
    this.stream = this.video.srcObject = null;
    this.button.disabled = true;
    this.note.textContent = "";
  }

  shoot() {
    const { videoWidth: width, videoHeight: height } = this.video;
    const canvas = element("canvas", { width, height });
    canvas.getContext("2d").drawImage(this.video, 0, 0);
    return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  }
}

function stop(stream) {
  stream?.getTracks().forEach((track) => track.stop());
}

class Sketch {
  constructor(canvas, onStroke) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.strokes = [];
    this.onStroke = onStroke;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.pen = event.pointerId;
      this.strokes.push({ width: Number($("pen").value), points: [this.place(event)] });
      this.draw();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== this.pen) return;
      this.strokes.at(-1).points.push(this.place(event));
      this.draw();
    });
    const lift = (event) => {
      if (event.pointerId !== this.pen) return;
      this.pen = null;
      this.onStroke();
    };
    canvas.addEventListener("pointerup", lift);
    canvas.addEventListener("pointercancel", lift);
    this.draw();
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      (event.clientX - box.left) * this.canvas.width / box.width,
      (event.clientY - box.top) * this.canvas.height / box.height,
    ];
  }

  draw() {
    const { context, canvas } = this;
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    Object.assign(context, { strokeStyle: "#000", lineCap: "round", lineJoin: "round" });
    for (const { width, points } of this.strokes) {
      context.lineWidth = width;
      context.beginPath();
      context.moveTo(...points[0]);
      // A dot is a line to where it begins.
      for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
      context.stroke();
    }
  }

  undo() {
    this.strokes.pop();
    this.draw();
  }

  clear() {
    this.strokes = [];
    this.draw();
  }

  file() {
    return new Promise((done) => this.canvas.toBlob(done, "image/png"));
  }
}

const SOURCES = ["photo", "webcam", "draw"];

function showSource(chosen) {
  for (const source of SOURCES) {
    const tab = $(`tab-${source}`);
    tab.setAttribute("aria-selected", String(source === chosen));
    tab.tabIndex = source === chosen ? 0 : -1;
    $(`from-${source}`).hidden = source !== chosen;
  }
  if (chosen === "webcam") camera.start();
  else camera.stop();
}

const camera = new Camera($("video"), $("shoot"), $("camera-note"));
const exampleCamera = new Camera($("example-video"), $("example-shoot"), $("example-camera-note"));
const sketch = new Sketch($("canvas"), lookAtSketch);

async function lookAtSketch() {
  if (sketch.strokes.length) choosePicture(await sketch.file());
}

function listenToSources() {
  SOURCES.forEach((source, i) => {
    const tab = $(`tab-${source}`);
    tab.addEventListener("click", () => showSource(source));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = SOURCES[(i + step + SOURCES.length) % SOURCES.length];
      showSource(next);
      $(`tab-${next}`).focus();
    });
  });
  $("photo").addEventListener("change", (event) => {
    choosePicture(event.target.files[0]);
    event.target.value = ""; // The same file may be chosen again.
  });
  $("shoot").addEventListener("click", async () => choosePicture(await camera.shoot()));
  $("undo").addEventListener("click", () => {
    sketch.undo();
    lookAtSketch();
  });
  $("clear").addEventListener("click", () => sketch.clear());
  document.addEventListener("paste", (event) => choosePicture(event.clipboardData.files[0]));
  // A file that is dropped beside would otherwise take the place of the page.
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", !$("teach").contains(event.target));
  });
  document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    const files = [...event.dataTransfer.files];
    if ($("teach").contains(event.target)) addExamples(files);
    else choosePicture(files[0]);
  });
}

// Teaching a class

const usable = () => state.examples.filter((example) => example.square);

async function addExamples(files) {
  const room = MOST - state.examples.length;
  say("teach-trouble", files.length > room ? `there is room for ${MOST} examples; ${files.length - room} were left out` : "");
  const added = files.slice(0, room).map((file) => ({ file, square: null, refused: null }));
  state.examples.push(...added);
  await prepare(added);
}

async function prepare(examples) {
  const prepared = state.prepared;
  const run = $("run").value;
  for (const example of examples) {
    try {
      if (example.file.size > state.largest) {
        throw new Refused(`the file has more than ${state.largest / 2 ** 20} MB`);
      }
      const asks = new URLSearchParams({ run, invert: $("invert").value });
      const answer = await ask(`/api/example?${asks}`, example.file);
      if (prepared !== state.prepared) return; // Another run is chosen by now.
      example.square = answer.square;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      example.refused = error.message;
    }
    showExamples();
  }
  showExamples();
}

function prepareAgain() {
  state.prepared += 1;
  for (const example of state.examples) Object.assign(example, { square: null, refused: null });
  return prepare(state.examples);
}

function showExamples() {
  const shown = state.examples.filter((example) => example.square || example.refused);
  $("examples").replaceChildren(...shown.map(exampleItem));
  showReadiness();
}

function exampleItem(example, i) {
  const label = `Remove example ${i + 1}`;
  const remove = element("button", { type: "button", textContent: "×", title: label, disabled: state.teaching });
  remove.setAttribute("aria-label", label);
  remove.addEventListener("click", () => {
    state.examples = state.examples.filter((other) => other !== example);
    showExamples();
  });
  if (example.refused) {
    const name = example.file.name ? `${example.file.name}: ` : "";
    return element("li", { className: "wrong" }, `${name}${example.refused}`, remove);
  }
  const small = chosenRun().size < 84 ? "pixels" : "";
  return element("li", {}, element("img", { src: example.square, alt: `Example ${i + 1}`, className: small }), remove);
}

function showReadiness() {
  const count = usable().length;
  const pending = state.examples.some((example) => !example.square && !example.refused);
  $("count").textContent = count
    ? `${count} ${count === 1 ? "example" : "examples"}, as the model will see them.`
    : "No examples yet.";
  let missing = "";
  if (count < FEWEST) missing = `Give at least ${FEWEST} examples.`;
  else if (!$("name").value.trim()) missing = "Give the class a name.";
  $("begin-note").textContent = state.teaching ? "" : missing;
  $("begin").disabled = state.teaching || pending || missing !== "";
}

async function teach() {
  const number = Number($("run").value);
  const wish = {
    run: number,
    name: $("name").value,
    parent: chosenRun().parents.length ? $("parent").value : null,
    method: document.querySelector("input[name=way]:checked").value,
    squares: usable().map((example) => example.square),
  };
  setTeaching(true);
  say("teach-trouble", "");
  $("learned").hidden = true;
  showLesson({ fraction: 0, doing: "beginning" });
  try {
    const lesson = await ask("/api/teach", JSON.stringify(wish));
    const result = await watch(lesson.number);
    await readRuns();
    const compared = $("compare").value === "" ? null : Number($("compare").value);
    showRuns(result.run, compared);
    state.examples = [];
    $("name").value = "";
    $("learned").replaceChildren(resultCard(result, state.runs[number].name));
    $("learned").hidden = false;
    look();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say("teach-trouble", error.message);
  } finally {
    $("lesson").hidden = true;
    setTeaching(false);
  }
}

async function watch(number) {
  for (;;) {
    const lesson = await ask(`/api/lesson?number=${number}`);
    if (lesson.result) return lesson.result;
    showLesson(lesson);
    await new Promise((done) => setTimeout(done, 200));
  }
}

function showLesson({ fraction, doing }) {
  $("lesson").hidden = false;
  $("progress").value = fraction;
  $("doing").textContent = `${Math.round(100 * fraction)} %: ${doing}`;
}

function setTeaching(teaching) {
  state.teaching = teaching;
  for (const control of $("teach").querySelectorAll("input, select")) control.disabled = teaching;
  if (!teaching) showWays(chosenRun());
  $("run").disabled = teaching;
  $("example-above").disabled = teaching || !state.picture;
  showExamples();
}

function resultCard(result, origin) {
  const points = 100 * (result.after - result.before);
  const change = `${points >= 0 ? "+" : "−"}${Math.abs(points).toFixed(1)} points`;
  const images = result.held_out ? "validation images, seen by neither training nor teaching" : "kept training images";
  const box = element("div", { className: "learned" }, element("h3", { textContent: `${result.name} is learned` }));
  box.append(element(
    "div", { className: "cards" },
    fact("Old classes before", percent(result.before)),
    fact("Old classes after", percent(result.after), change),
    fact("Its photos", percent(result.recall), "recognised"),
  ));
  const sentences = [
    `Old classes: ${result.images.toLocaleString("en")} ${images}. The ${result.examples} photos are what it learned from, by ${result.method}, in ${took(result.seconds)}.`,
  ];
  if (result.lost.length) {
    const lost = result.lost.map(({ name, before, after }) => `${name} ${percent(before)} → ${percent(after)}`);
    sentences.push(`Most was lost by ${lost.join(", ")}.`);
  }
  sentences.push(`Saved as ${result.folder}, which is the run chosen above now; ${origin} is as it was.`);
  box.append(...sentences.map((textContent) => element("p", { textContent })));
  return box;
}

function fact(label, value, detail = "") {
  return element(
    "div", { className: "card" },
    element("div", { className: "label", textContent: label }),
    element("div", { className: "value", textContent: value }),
    element("div", { className: "detail", textContent: detail }),
  );
}

function listenToTeaching() {
  $("name").addEventListener("input", showReadiness);
  $("example-files").addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = "";
    addExamples(files);
  });
  $("example-above").addEventListener("click", () => addExamples([state.picture]));
  $("example-camera").addEventListener("click", () => {
    const open = $("example-webcam").hidden;
    $("example-webcam").hidden = !open;
    $("example-camera").setAttribute("aria-pressed", String(open));
    if (open) exampleCamera.start();
    else exampleCamera.stop();
  });
  $("example-shoot").addEventListener("click", async () => addExamples([await exampleCamera.shoot()]));
  $("begin").addEventListener("click", teach);
}

async function begin() {
  try {
    await readRuns();
  } catch (error) {
    say("trouble", error.message);
    return;
  }
  showRuns(0, state.runs.length > 1 ? 1 : null);
  listenToSources();
  listenToTeaching();
  $("run").addEventListener("change", () => {
    showRun();
    prepareAgain();
    look();
  });
  $("invert").addEventListener("change", () => {
    prepareAgain();
    look();
  });
  for (const id of ["compare", "class", "method"]) $(id).addEventListener("change", look);
  showReadiness();
  document.body.dataset.ready = "yes";
}

begin();

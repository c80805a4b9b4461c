"use strict";
// Text from the pool reaches the page by textContent only.
const byId = (id) => document.getElementById(id);
const make = (name, text, className) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};
const withImages = Boolean(document.body.dataset.images);

async function ask(address) {
  const answer = await fetch(address);
  const found = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  byId("problem").textContent = found.error || "";
  return answer.ok ? found : null;
}

// Tags

const TAGS = `tags of ${document.body.dataset.project}`;
const tags = () => new Set(JSON.parse(localStorage.getItem(TAGS) || "[]"));
function showTags() {
  const all = tags();
  byId("tags").hidden = !all.size;
  byId("tagged").textContent = `${all.size} tagged`;
  byId("uids").value = [...all].join("\n");
  for (const tile of document.querySelectorAll(".tile")) tile.classList.toggle("tagged", all.has(tile.dataset.uid));
}
function toggle(uid) {
  const all = tags();
  if (!all.delete(uid)) all.add(uid);
  localStorage.setItem(TAGS, JSON.stringify([...all]));
  showTags();
}
byId("untag").addEventListener("click", () => { localStorage.removeItem(TAGS); showTags(); });
document.querySelectorAll("button.tag").forEach((b) => b.addEventListener("click", () => toggle(b.dataset.uid)));

// Tiles

function rejectedTile(row) {
  const made = make("div", undefined, "tile");
  made.tabIndex = 0;
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", `Rejected: ${row.reason}`);
  made.append(make("code", `${row.shard} / ${row.key}`), make("b", row.reason, "caption"), make("span", row.detail || "", "caption"));
  return made;
}
function tile(row) {
  if (row.reason) return rejectedTile(row);
  const made = make("a", undefined, "tile");
  made.href = `/sample/${encodeURIComponent(row.uid)}`;
  made.dataset.uid = row.uid;
  if (withImages) {
    const image = make("img");
    image.loading = "lazy";
    image.alt = "";
    image.src = `/image/${encodeURIComponent(row.shard)}/${row.row}`;
    made.append(image);
  } else made.append(make("code", row.url || "no URL"));
  made.append(make("span", row.caption, "caption"));
  for (const [name, value] of Object.entries(row.scores)) {
    const line = make("span", undefined, "value");
    line.append(make("span", name), make("b", value === null ? "–" : Number(value).toFixed(4)));
    made.append(line);
  }
  return made;
}

document.addEventListener("keydown", (event) => {
  const typing = /INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (location.pathname.startsWith("/sample/") && history.length > 1) history.back();
    else document.activeElement.blur();
    return;
  }
  if (typing) return;
  if (event.key === "/" && byId("search")) { event.preventDefault(); byId("search").focus(); return; }
  const here = document.activeElement.closest(".tile");
  if (event.key === "t") {
    const one = here || document.querySelector("button.tag");
    if (one && one.dataset.uid) toggle(one.dataset.uid);
    return;
  }
  if (!event.key.startsWith("Arrow")) return;
  const tiles = [...document.querySelectorAll(".tile")];
  if (!tiles.length || (!here && !byId("grid"))) return;
  event.preventDefault();
  const at = tiles.indexOf(here);
  const across = tiles.filter((t) => t.offsetTop === tiles[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
  tiles[Math.max(0, Math.min(tiles.length - 1, at < 0 ? 0 : at + step))].focus();
});

// The grid

const grid = byId("grid");
let offset = 0, total = 0, loading = false, round = 0;
const number = (rows, isAbout) => (isAbout ? "about " : "") + rows.toLocaleString("en");
const sentence = (text) => text[0].toUpperCase() + text.slice(1);
function showTotal(rows, note, isAbout) {
  if (!isAbout) total = rows;
  byId("status").textContent = sentence(`${number(rows, isAbout)} rows. ${note}`);
}
async function more() {
  if (loading || (offset && offset >= total)) return;
  loading = true;
  const mine = round;
  const asked = new URLSearchParams(location.search);
  asked.set("offset", offset);
  if (!offset) byId("status").textContent = "Searching …";
  const found = await ask(`/api/rows?${asked}`);
  if (mine !== round) return;
  loading = false;
  if (!found) { byId("status").textContent = ""; return; }
  if (found.total !== null) showTotal(found.total, found.note);
  else if (!offset) {
    total = Infinity;
    byId("status").textContent = `Counting … ${found.note}`;
    ask(`/api/count?${asked}`).then((counted) => { if (counted && mine === round) showTotal(counted.total, counted.note, counted.about); });
  }
  if (found.last) total = offset + found.rows.length;
  grid.append(...found.rows.map(tile));
  offset += found.rows.length;
  showTags();
  if (found.rows.length) moreIfNear();
}
function moreIfNear() { if (end.getBoundingClientRect().top < innerHeight + 600) more(); }
function restart() { round++; offset = 0; total = 0; loading = false; grid.replaceChildren(); more(); }
const end = document.querySelector(".note");
if (grid) {
  const form = byId("filter");
  const ownVersions = () => {
    for (const option of form.elements.version.options)
      option.hidden = option.disabled = Boolean(option.dataset.recipe) && option.dataset.recipe !== form.elements.recipe.value;
  };
  const fill = () => {
    const asked = new URLSearchParams(location.search);
    for (const field of form.elements) if (field.name && asked.has(field.name)) field.value = asked.get(field.name);
    ownVersions();
    if (innerWidth > 700 || ["shard", "recipe", "rejected", "show"].some((name) => asked.has(name))) byId("more").open = true;
    for (const option of form.elements.version.options)
      if (!option.disabled && option.value === (asked.get("version") || "")) option.selected = true;
    if (Number(localStorage.getItem("size"))) byId("size").value = localStorage.getItem("size");
    const shown = (asked.get("show") || "").split(",");
    form.querySelectorAll(".show").forEach((box) => { box.checked = shown.includes(box.value); });
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const asked = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (value) asked.set(name, value);
    const shown = [...form.querySelectorAll(".show:checked")].map((box) => box.value);
    if (shown.length) asked.set("show", shown.join(","));
    if (!asked.get("text")) { asked.delete("encoder"); asked.delete("side"); }
    if (!asked.get("sort")) asked.delete("order");
    if (asked.get("text")) { asked.delete("sort"); asked.delete("order"); }
    if (!asked.get("recipe")) for (const name of ["version", "member", "step"]) asked.delete(name);
    if ((asked.get("member") || "kept") === "kept") { asked.delete("member"); asked.delete("step"); }
    if (asked.get("rejected")) for (const name of [...asked.keys()]) if (!["rejected", "shard"].includes(name)) asked.delete(name);
    history.pushState(null, "", `/?${asked}`);
    form.reset();
    fill();
    restart();
  });
  addEventListener("popstate", () => { form.reset(); fill(); restart(); });
  form.elements.recipe.addEventListener("change", () => { form.elements.version.value = ""; ownVersions(); });
  const setSize = (pixels) => document.documentElement.style.setProperty("--size", `${pixels}px`);
  byId("size").addEventListener("input", (e) => { setSize(e.target.value); localStorage.setItem("size", e.target.value); });
  if (Number(localStorage.getItem("size"))) setSize(localStorage.getItem("size"));
  for (const event of ["scroll", "resize"]) addEventListener(event, () => { if (offset) moreIfNear(); }, { passive: true });
  fill();
  restart();
}

// What if

const trial = byId("trial");
let limits = {}, asking = false, again = false;
async function tryOut() {
  again = asking; // one request at a time, and then the newest limits
  if (asking) return;
  asking = true;
  try { await tryLimits(); } finally { asking = false; }
  if (again) tryOut();
}
async function tryLimits() {
  const asked = new URLSearchParams({ recipe: trial.dataset.recipe });
  for (const [step, limit] of Object.entries(limits)) asked.set(`limit${step}`, limit);
  const found = await ask(`/api/trial?${asked}`);
  if (!found) return;
  const last = found.steps[found.steps.length - 1], isChanged = found.enter.total || found.leave.total;
  const isAbout = found.about && Boolean(isChanged);
  byId("status").textContent = sentence(
    `${number(found.rows, last && last.about)} rows; ${found.version || "the recipe as it is"} has ` +
    `${found.current.toLocaleString("en")}, of which ${number(found.overlap, isAbout)} stay.`);
  byId("note").textContent = found.note;
  if (trial.childElementCount !== found.steps.length) trial.replaceChildren(...found.steps.map(stepBox));
  found.steps.forEach((step, n) => showStep(trial.children[n], step));
  for (const [id, label] of [["enter", "entering"], ["leave", "leaving"]])
    byId(label).textContent = `(${number(found[id].total, isAbout)})`;
  byId("yaml").textContent = found.yaml;
  if (again) return; // images follow when the limits rest
  for (const id of ["enter", "leave"]) byId(id).replaceChildren(...found[id].rows.map(tile));
  history.replaceState(null, "", `/what-if?${asked}`);
  showTags();
}
const svg = (name, values) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
  return made;
};
function stepBox(step) {
  const box = make("section", undefined, "step");
  box.append(make("h2"), make("p"));
  if (!step.histogram) return box;
  const chart = svg("svg", { viewBox: "0 0 600 90", preserveAspectRatio: "none", "aria-hidden": "true" });
  box.append(chart);
  if (step.limits.includes("threshold")) {
    const range = make("input");
    range.type = "range";
    range.step = "any";
    range.setAttribute("aria-label", `Threshold of step ${step.step}`);
    const set = () => { // the browser rounds the value of a slider, so that its lower end would drop a row
      const isLowest = range.value - range.min < 1e-9 * (range.max - range.min);
      limits[step.step] = `threshold:${isLowest ? range.min : range.value}`;
      tryOut();
    };
    range.addEventListener("input", set);
    const drag = (event) => {
      if (!event.buttons) return;
      const { left, width } = chart.getBoundingClientRect();
      range.value = Number(range.min) + ((event.clientX - left) / width) * (range.max - range.min);
      markThreshold(chart, (600 * (range.value - range.min)) / (range.max - range.min || 1));
      set();
    };
    chart.classList.add("draggable");
    chart.addEventListener("pointerdown", (event) => { chart.setPointerCapture(event.pointerId); box.dataset.held = "1"; drag(event); });
    chart.addEventListener("lostpointercapture", () => delete box.dataset.held);
    chart.addEventListener("pointermove", drag);
    box.append(range);
  }
  box.append(make("p", undefined, "ends"));
  if (step.limits.includes("fraction")) {
    const fraction = make("input");
    Object.assign(fraction, { type: "number", min: 0, max: 1, step: "any" });
    fraction.addEventListener("change", () => { limits[step.step] = `fraction:${fraction.value}`; tryOut(); });
    const label = make("label", `Kept, as a fraction of ${step.basis.toLocaleString("en")} rows`);
    label.append(fraction);
    box.append(label);
  }
  return box;
}
function markThreshold(chart, x) {
  const line = chart.querySelector("line") || chart.appendChild(svg("line", { y1: 0, y2: 90 }));
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
}
function showStep(box, step) {
  box.children[0].textContent = `${step.step}. ${step.text}`;
  const entered = number(step.entered, step.about_entered), kept = number(step.kept, step.about);
  box.children[1].textContent = sentence(`${entered} entered, ${kept} remain`) +
    (step.threshold === null ? "" : `; threshold ${step.threshold.toFixed(5)}`);
  if (!step.histogram) return;
  const field = box.querySelector("input[type=number]");
  if (field && document.activeElement !== field) field.value = Number((step.kept / step.basis).toFixed(4));
  const { low, high, counts } = step.histogram;
  const most = Math.max(...counts), chart = box.querySelector("svg");
  box.querySelector(".ends").replaceChildren(make("span", low.toFixed(4)), make("span", high.toFixed(4)));
  chart.replaceChildren(...counts.map((count, n) =>
    svg("rect", { x: n * 10, width: 9, y: 90 - (88 * count) / most, height: (88 * count) / most })));
  if (step.threshold === null) return;
  const range = box.querySelector("input[type=range]"), isHeld = Boolean(box.dataset.held);
  markThreshold(chart, (600 * ((isHeld ? Number(range.value) : step.threshold) - low)) / (high - low || 1));
  if (range && !isHeld && document.activeElement !== range) Object.assign(range, { min: low, max: high, value: step.threshold });
}
if (trial) {
  for (const [name, value] of new URLSearchParams(location.search)) if (name.startsWith("limit")) limits[name.slice(5)] = value;
  byId("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(byId("yaml").textContent);
    byId("status").textContent = "Copied.";
  });
  tryOut();
}
showTags();

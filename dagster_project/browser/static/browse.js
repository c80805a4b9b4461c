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

const TAGS = "tags";
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

function tile(row) {
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
    if (one) toggle(one.dataset.uid);
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
const PAGE = 60;
let offset = 0, total = 0, loading = false, round = 0;
function showTotal(rows, note) {
  total = rows;
  byId("status").textContent = `${rows.toLocaleString("en")} rows. ${note}`;
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
    byId("status").textContent = "Counting …";
    ask(`/api/count?${asked}`).then((counted) => { if (counted && mine === round) showTotal(counted.total, ""); });
  }
  if (found.rows.length < PAGE) total = offset + found.rows.length;
  grid.append(...found.rows.map(tile));
  offset += found.rows.length;
  showTags();
  if (found.rows.length && end.getBoundingClientRect().top < innerHeight + 600) more();
}
function restart() { round++; offset = 0; total = 0; loading = false; grid.replaceChildren(); more(); }
const end = document.querySelector(".note");
if (grid) {
  const form = byId("filter");
  const fill = () => {
    const asked = new URLSearchParams(location.search);
    for (const field of form.elements) if (field.name && asked.has(field.name)) field.value = asked.get(field.name);
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
    if (!asked.get("recipe")) { asked.delete("member"); asked.delete("step"); }
    history.pushState(null, "", `/?${asked}`);
    restart();
  });
  addEventListener("popstate", () => { form.reset(); fill(); restart(); });
  byId("size").addEventListener("input", (e) => document.documentElement.style.setProperty("--size", `${e.target.value}px`));
  new IntersectionObserver((seen) => { if (seen[0].isIntersecting && offset) more(); }, { rootMargin: "600px" }).observe(end);
  fill();
  restart();
}

// What if

const trial = byId("trial");
let limits = {}, asking = 0;
async function tryOut() {
  const mine = ++asking;
  const asked = new URLSearchParams({ recipe: trial.dataset.recipe });
  for (const [step, limit] of Object.entries(limits)) asked.set(`limit${step}`, limit);
  history.replaceState(null, "", `/what-if?${asked}`);
  const found = await ask(`/api/trial?${asked}`);
  if (!found || mine !== asking) return;
  byId("status").textContent =
    `${found.rows.toLocaleString("en")} rows; the current version has ${found.current.toLocaleString("en")}, ` +
    `of which ${found.overlap.toLocaleString("en")} stay.`;
  if (trial.childElementCount !== found.steps.length) trial.replaceChildren(...found.steps.map(stepBox));
  found.steps.forEach((step, n) => showStep(trial.children[n], step));
  for (const [id, label] of [["enter", "entering"], ["leave", "leaving"]]) {
    byId(id).replaceChildren(...found[id].rows.map(tile));
    byId(label).textContent = `(${found[id].total.toLocaleString("en")})`;
  }
  byId("yaml").textContent = found.yaml;
  showTags();
}
function stepBox(step) {
  const box = make("section", undefined, "step");
  box.append(make("h3"), make("p"));
  if (!step.histogram) return box;
  const chart = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  chart.setAttribute("viewBox", "0 0 600 90");
  chart.setAttribute("preserveAspectRatio", "none");
  chart.setAttribute("aria-hidden", "true");
  box.append(chart);
  if (step.kind !== "keep_top") return box;
  const range = make("input");
  range.type = "range";
  range.step = "any";
  range.setAttribute("aria-label", `Threshold of step ${step.step}`);
  range.addEventListener("input", () => { limits[step.step] = `threshold:${range.value}`; wait(); });
  const fraction = make("input");
  Object.assign(fraction, { type: "number", min: 0.001, max: 1, step: 0.01 });
  fraction.addEventListener("change", () => { limits[step.step] = `fraction:${fraction.value}`; tryOut(); });
  const label = make("label", "Fraction of the pool (shown: of what entered)");
  label.append(fraction);
  box.append(range, label);
  return box;
}
let waiting = 0;
const wait = () => { clearTimeout(waiting); waiting = setTimeout(tryOut, 120); };
function showStep(box, step) {
  box.children[0].textContent = `${step.step}. ${step.text}`;
  box.children[1].textContent = `${step.entered.toLocaleString("en")} entered, ${step.kept.toLocaleString("en")} remain` +
    (step.threshold === null ? "" : `; threshold ${step.threshold.toFixed(5)}`);
  if (!step.histogram) return;
  const field = box.querySelector("input[type=number]");
  if (field && document.activeElement !== field) field.placeholder = (step.kept / step.entered).toFixed(3);
  const { low, high, counts } = step.histogram;
  const most = Math.max(...counts), chart = box.querySelector("svg");
  const shape = (name, values) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
    return made;
  };
  chart.replaceChildren(...counts.map((count, n) =>
    shape("rect", { x: n * 10, width: 9, y: 90 - (88 * count) / most, height: (88 * count) / most })));
  if (step.threshold !== null) {
    const x = (600 * (step.threshold - low)) / (high - low || 1);
    chart.append(shape("line", { x1: x, x2: x, y1: 0, y2: 90 }));
    const range = box.querySelector("input[type=range]");
    if (range && document.activeElement !== range) Object.assign(range, { min: low, max: high, value: step.threshold });
  }
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

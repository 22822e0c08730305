// The page: its state, what is shown of it, and what the controls do.
(() => {
  const $ = (id) => document.getElementById(id);
  const OVERLAYS = {
    none: "nothing", field: "receptive field", arrows: "flow, arrows", colours: "flow, colours", spread: "spread", mask: "mask",
  };
  const FULL_PERIOD = 4200; // milliseconds from plain to learned and back
  const page = JSON.parse($("document").textContent);
  const { layers, image } = page;
  const picture = new Image();
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const beginning = () => ({
    layer: page.start.layer, depth: 1, group: null, overlay: "none", scale: 1, zoom: 1, active: 0,
    centre: [(image.height - 1) / 2, (image.width - 1) / 2], at: [page.start.at, null],
  });
  const state = { ...beginning(), playing: false, view: null };
  let saying = 0;
  let growing = 0;
  let leaping = 0;

  const scene = makeScene(page, state, picture);
  const { layer, unitOf, pointsOf, redraw } = scene;
  const deepest = () => Rule.stack(layers, state.layer, 3).length;
  const named = (one) => (one.name || "the model itself") + (one.index ? `, call ${one.index + 1}` : "");
  const pixels = (value) => Math.abs(value).toFixed(Math.abs(value) < 1 ? 2 : 1);
  const signed = (value) => (value < 0 ? "\u2212" : "+") + pixels(value);
  const percent = (part) => `${(100 * part).toFixed(part && part < 0.1 ? 1 : 0)}\u202f%`;
  const number = (value, text) => (value === null || value === undefined || Number.isNaN(value) ? "not a number" : text(value));

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  // ---- numbers

  function numbersAt(which) {
    const unit = unitOf(which);
    return { at: state.at[which], ...numbersOf(unit) };
  }

  function numbersOf(unit) {
    const one = layer();
    const found = Rule.summary(one, state.group);
    const place = (unit[0] / one.every) * one.columns + unit[1] / one.every;
    return {
      unit, middle: Rule.middle(one, unit), offset: [found.y[place], found.x[place]], spread: found.spread[place],
      mask: found.mask ? found.mask[place] : null, outside: found.outside[place],
    };
  }

  const rows = {
    unit: (found) => found.unit.join(", "),
    middle: (found) => found.middle.map((value) => value.toFixed(1)).join(", "),
    "mean offset": (found) => number(found.offset[0], () => found.offset.map(signed).join(", ")),
    spread: (found) => number(found.spread, pixels),
    mask: (found) => (found.mask === null ? "none" : found.mask.toFixed(2)),
    outside: (found) => percent(found.outside),
  };

  function sentence(which) {
    const found = numbersAt(which);
    const [down, right] = found.offset;
    const way = number(down, () => `${pixels(down)} pixels ${down < 0 ? "up" : "down"} and ${pixels(right)} ${right < 0 ? "left" : "right"}`);
    const through = state.depth > 1 ? ` through ${state.depth} layers` : "";
    return (
      `Position ${"AB"[which]}: unit at row ${found.unit[0]}, column ${found.unit[1]} of layer ${named(layer())}, ` +
      `image pixel y ${found.middle[0].toFixed(0)}, x ${found.middle[1].toFixed(0)}. Mean offset ${way}, ` +
      `spread ${number(found.spread, pixels)} pixels` + (found.mask === null ? "" : `, mask ${found.mask.toFixed(2)}`) +
      `. ${pointsOf(which) ? `${pointsOf(which).length} sampling points${through}.` : ""}`
    );
  }

  // ---- what is said beside it

  // Radio buttons: made anew only where others are wanted, since one of them may have the focus.
  function choices(place, name, options, chosen, choose) {
    const wanted = options.map(([value, , title]) => `${value} ${title}`).join("\n");
    if (place.dataset.options === wanted) {
      for (const input of place.querySelectorAll("input")) input.checked = input.value === String(chosen);
      return;
    }
    place.dataset.options = wanted;
    const legend = place.querySelector("legend");
    place.replaceChildren(
      legend,
      ...options.map(([value, text, title]) => {
        const input = element("input", { type: "radio", name, value, checked: value === chosen });
        input.addEventListener("change", () => choose(value));
        return element("label", { className: "choice", title: title || "" }, input, element("span", {}, text));
      }),
    );
  }

  function showControls() {
    const one = layer();
    $("layer").value = state.layer;
    const depths = [1, 2, 3].filter((depth) => depth <= deepest());
    choices(
      $("depth"), "depth",
      depths.map((depth) => {
        const chain = Rule.stack(layers, state.layer, depth);
        const names = chain.map(named).join(", ");
        return [depth, `${depth} layer${depth > 1 ? "s" : ""}`, `${names}: ${Rule.paths(chain, state.group)} points`];
      }),
      state.depth, (depth) => change({ depth }),
    );
    $("groups").hidden = one.groups < 2;
    if ($("group").length !== one.groups + 1) {
      const numbers = Array.from({ length: one.groups }, (_, g) => element("option", { value: g }, String(g + 1)));
      $("group").replaceChildren(element("option", { value: "" }, "all"), ...numbers);
    }
    $("group").value = state.group ?? "";
    const there = Object.entries(OVERLAYS).filter(([kind]) => (kind !== "field" || one.fields) && (kind !== "mask" || one.masks));
    choices($("overlay"), "overlay", there, state.overlay, (overlay) => change({ overlay }));
    showStatistics(one);
    for (const row of $("layers").rows) row.classList.toggle("chosen", row.dataset.layer === String(state.layer));
  }

  // Every layer in a line, to compare how far their offsets go.
  function listLayers() {
    const most = Math.max(...layers.map((one) => one.statistics.deviation || 0)) || 1;
    $("layers").tBodies[0].replaceChildren(
      ...layers.map((one, index) => {
        const button = element("button", { type: "button" }, named(one));
        button.addEventListener("click", () => toLayer(index));
        const bar = element("span", { className: "bar" });
        bar.style.width = `${(100 * (one.statistics.deviation || 0)) / most}%`;
        const row = element(
          "tr", {}, element("th", { scope: "row" }, button, bar),
          element("td", {}, number(one.statistics.deviation, pixels)), element("td", {}, percent(one.statistics.outside)),
        );
        row.dataset.layer = index;
        return row;
      }),
    );
  }

  function showStatistics(one) {
    const { statistics } = one;
    const size = (pair) => pair.join("\u202f\u00d7\u202f");
    const entries = {
      kernel: size(one.kernel) + (one.dilation.some((value) => value > 1) ? `, dilation ${size(one.dilation)}` : ""),
      map: `${size(one.output)} units, ${one.unitStep.map((step) => Number(step.toFixed(2)))[0]} px apart`,
      "offsets, mean (y, x)": number(statistics.mean[0], () => `${statistics.mean.map(signed).join(", ")} px`),
      deviation: number(statistics.deviation, (value) => `${pixels(value)} px`),
      "largest, on an axis": number(statistics.largest, (value) => `${pixels(value)} px`),
      "samples outside": percent(statistics.outside),
      "mask, mean": statistics.mask_mean === null ? "none" : statistics.mask_mean.toFixed(2),
    };
    $("of-layer").textContent = named(one);
    $("statistics").replaceChildren(
      ...Object.entries(entries).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
    );
    showHistogram(one);
    const missing = [];
    if (one.every > 1) {
      missing.push(`Of this layer the file has room for every ${one.every === 2 ? "second" : `${one.every}th`} row and column.`);
    }
    if (page.left_out.length) missing.push(`The file has no room for ${page.left_out.join(", ")}.`);
    $("missing").hidden = !missing.length;
    $("missing").textContent = missing.join(" ");
  }

  // How many samples have offsets of which length.
  function showHistogram(one) {
    const plane = one.rows * one.columns;
    one.lengths ??= (() => {
      const lengths = new Float32Array(one.groups * one.taps * plane);
      for (let i = 0; i < lengths.length; i++) {
        const place = i + Math.floor(i / plane) * plane;
        lengths[i] = Math.hypot(one.offsets[place] * one.step[0], one.offsets[place + plane] * one.step[1]) * one.offset.scale;
      }
      const most = scene.largest(lengths) || 1;
      const counts = new Array(32).fill(0);
      for (const length of lengths) counts[Math.min(Math.floor((length / most) * 32), 31)]++;
      return { counts, most };
    })();
    const { counts, most } = one.lengths;
    const highest = Math.max(...counts, 1);
    const svg = $("histogram").querySelector("svg");
    svg.setAttribute("viewBox", "0 0 32 10");
    const bars = counts.map((count, i) => `M${i + 0.08} 10v${-(10 * count) / highest}h.84V10z`).join("");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", bars);
    svg.replaceChildren(path);
    $("histogram").querySelector("figcaption").replaceChildren(
      element("span", {}, "0"), element("span", {}, "lengths of its offsets"), element("span", {}, `${pixels(most)} px`),
    );
  }

  function showKey() {
    const one = layer();
    const flow = Rule.summary(one, state.group);
    const coloured = ["field", "colours", "spread", "mask"].includes(state.overlay);
    $("key").hidden = state.overlay === "none";
    $("colours").hidden = !coloured;
    if (coloured) Draw.key($("colours"), Math.min(devicePixelRatio || 1, 3), state.overlay === "colours");
    $("meaning").textContent = {
      field: "influence on the unit (square root), none to most; circle: effective radius",
      arrows: "arrow: mean offset of a unit's samples, true length",
      colours: `direction of a unit's mean offset; strongest: ${pixels(scene.flowLimit(one))} px`,
      spread: `spread of a unit's samples, 0 to ${pixels(scene.largest(flow.spread))} px`,
      mask: `mean mask, 0 to ${flow.mask ? scene.largest(flow.mask).toFixed(2) : ""}`,
    }[state.overlay] || "";
  }

  function showNote() {
    const one = layer();
    const notes = [];
    const chain = Rule.stack(layers, state.layer, state.depth);
    if (Rule.paths(chain, state.group) > Rule.MOST_PATHS) {
      notes.push(`${Rule.paths(chain, state.group)} points are too many to draw: choose fewer layers or one offset group.`);
    } else if (state.depth > 1) {
      notes.push(`From ${chain.map(named).join(" through ")}: ${Rule.paths(chain, state.group)} samples.`);
    }
    if (state.overlay === "field" && one.fields) {
      const chosen = Rule.nearestField(one, unitOf(state.active));
      const same = one.fields.units[chosen].join() === unitOf(state.active).join();
      const which = same ? "of this unit" : `of unit (${one.fields.units[chosen].join(", ")}), dashed: the nearest that was computed`;
      notes.push(`Receptive field ${which}. Effective radius ${pixels(one.fields.radius[chosen])} px.`);
    }
    $("note").hidden = !notes.length;
    $("note").textContent = notes.join(" ");
  }

  function showNumbers() {
    const there = [0, 1].filter((which) => state.at[which]);
    const found = there.map(numbersAt);
    const table = $("numbers");
    table.tHead.replaceChildren(
      element("tr", {}, element("td"), ...there.map((which) => element("th", { scope: "col", className: "ab"[which] }, "AB"[which]))),
    );
    table.tBodies[0].replaceChildren(
      ...Object.entries(rows).map(([name, text]) =>
        element("tr", {}, element("th", { scope: "row" }, name), ...found.map((one) => element("td", {}, text(one))))),
    );
    for (const input of document.querySelectorAll("[name=position]")) input.checked = Number(input.value) === state.active;
    $("remove").hidden = !state.at[1];
    const text = there.map(sentence).join(" ");
    $("marks").setAttribute("aria-label", `${image.alt}. ${text}`);
    clearTimeout(saying);
    saying = setTimeout(() => ($("said").textContent = text), 300);
  }

  function showPointer(at, unit) {
    const found = numbersOf(unit);
    const parts = [
      `pixel (${at.map((value) => value.toFixed(0)).join(", ")})`, `unit (${unit.join(", ")})`,
      `mean offset (${number(found.offset[0], () => found.offset.map(signed).join(", "))}) px`, `spread ${number(found.spread, pixels)} px`,
    ];
    if (found.mask !== null) parts.push(`mask ${found.mask.toFixed(2)}`);
    $("pointer").textContent = parts.join("  \u00b7  ");
  }

  function showScale() {
    $("scale").value = state.scale;
    $("amount").textContent = `\u00d7\u202f${state.scale.toFixed(2)}`;
    $("scale").setAttribute("aria-valuetext", `offsets times ${state.scale.toFixed(2)}`);
  }

  // ---- what changes it

  function change(changes) {
    const before = { ...state };
    Object.assign(state, changes);
    state.depth = Math.min(state.depth, deepest());
    if (state.group !== null && state.group >= layer().groups) state.group = null;
    if ((state.overlay === "field" && !layer().fields) || (state.overlay === "mask" && !layer().masks)) state.overlay = "none";
    const same = (...names) => names.every((name) => before[name] === state[name]);
    if (!same("layer", "depth", "group", "overlay")) {
      scene.showPointed(null);
      showControls();
    }
    if (!same("layer", "group", "overlay")) showKey();
    if (!same("scale")) showScale();
    if (!same("zoom", "centre")) scene.showPointed(null);
    if (!same("layer", "depth", "group", "overlay", "at", "active")) {
      showNumbers();
      showNote();
    }
    redraw();
  }

  function moveTo(at, which = state.active) {
    const bounded = [0, 1].map((axis) => Math.min(Math.max(at[axis], -0.5), (axis ? image.width : image.height) - 0.5));
    change({ at: state.at.map((other, index) => (index === which ? bounded : other)), active: which });
  }

  function choose(which) {
    if (state.at[which]) return change({ active: which });
    // The second position begins where the picture is likely to be another.
    const [y, x] = state.at[0];
    const far = x < image.width / 2 ? 0.75 : 0.25;
    return moveTo([y, far * (image.width - 1)], which);
  }

  function step(down, right) {
    const one = layer();
    const unit = unitOf(state.active);
    const moved = [unit[0] + down * one.every, unit[1] + right * one.every];
    const last = [(one.rows - 1) * one.every, (one.columns - 1) * one.every];
    moveTo(Rule.middle(one, moved.map((value, axis) => Math.min(Math.max(value, 0), last[axis]))));
    keepInSight();
  }

  function keepInSight() {
    const [y, x] = state.at[state.active];
    const seen = state.view;
    const away = Math.max(
      Math.abs(Draw.toX(seen, x) / seen.width - 0.5), Math.abs(Draw.toY(seen, y) / seen.height - 0.5),
    );
    if (state.zoom > 1 && away > 0.35) change({ centre: [y, x] });
  }

  function zoomBy(factor) {
    const zoom = Math.min(Math.max(state.zoom * factor, 1), 16);
    change({ zoom, centre: state.at[state.active] });
    $("wider").disabled = zoom === 1;
    $("closer").disabled = zoom === 16;
  }

  function toLayer(number) {
    change({ layer: Math.min(Math.max(number, 0), layers.length - 1) });
  }

  function play(on) {
    state.playing = on;
    $("play").classList.toggle("playing", on);
    $("play").querySelector("span").textContent = on ? "Pause" : "Play";
    cancelAnimationFrame(growing);
    clearTimeout(leaping);
    if (!on) return;
    if (still.matches) return leap();
    // From where the offsets are now: the time at which the wave has their scale.
    const phase = Math.acos(1 - 2 * Math.min(state.scale, 1)) / (2 * Math.PI);
    const begun = performance.now() - phase * FULL_PERIOD;
    const frame = (now) => {
      if (!state.playing) return;
      change({ scale: Math.round(500 * (1 - Math.cos((2 * Math.PI * (now - begun)) / FULL_PERIOD))) / 1000 });
      growing = requestAnimationFrame(frame);
    };
    growing = requestAnimationFrame(frame);
  }

  // Without motion: plain and learned in turn.
  function leap() {
    if (!state.playing) return;
    change({ scale: state.scale ? 0 : 1 });
    leaping = setTimeout(leap, 1500);
  }

  function reset() {
    play(false);
    change(beginning());
    $("wider").disabled = true;
    $("closer").disabled = false;
  }

  function imagePosition(event) {
    const box = $("marks").getBoundingClientRect();
    const seen = state.view;
    return [(event.clientY - box.top) / seen.k + seen.top, (event.clientX - box.left) / seen.k + seen.left];
  }

  function listenToPointer() {
    const marks = $("marks");
    let pressed = null;
    const inside = ([y, x]) => y >= -0.5 && x >= -0.5 && y < image.height - 0.5 && x < image.width - 0.5;
    marks.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      pressed = event.shiftKey ? 1 - state.active : state.active;
      if (event.pointerType !== "touch") {
        marks.setPointerCapture(event.pointerId);
        moveTo(imagePosition(event), pressed);
      }
    });
    marks.addEventListener("pointermove", (event) => {
      const at = imagePosition(event);
      if (pressed !== null) moveTo(at, pressed);
      const unit = inside(at) ? Rule.unitAt(layer(), at) : null;
      scene.showPointed(unit);
      if (unit) showPointer(at, unit);
    });
    marks.addEventListener("pointerup", (event) => {
      if (pressed !== null) moveTo(imagePosition(event), pressed);
      pressed = null;
    });
    marks.addEventListener("pointercancel", () => (pressed = null));
    marks.addEventListener("pointerleave", () => scene.showPointed(null));
  }

  function listenToKeys() {
    const kinds = () => [...document.querySelectorAll("[name=overlay]")].map((input) => input.value);
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const keys = {
      " ": () => play(!state.playing),
      "[": () => change({ scale: Math.max(Math.round(20 * state.scale - 1) / 20, 0) }),
      "]": () => change({ scale: Math.min(Math.round(20 * state.scale + 1) / 20, 2) }),
      PageUp: () => toLayer(state.layer - 1),
      PageDown: () => toLayer(state.layer + 1),
      v: () => change({ overlay: kinds()[(kinds().indexOf(state.overlay) + 1) % kinds().length] }),
      c: () => choose(1 - state.active),
      r: reset,
      "+": () => zoomBy(2),
      "=": () => zoomBy(2),
      "-": () => zoomBy(0.5),
      "?": () => ($("help").open = !$("help").open),
    };
    for (const depth of [1, 2, 3]) keys[depth] = () => change({ depth });
    $("marks").addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const move = moves[event.key];
      const does = move ? () => step(...move.map((part) => part * (event.shiftKey ? 5 : 1))) : keys[event.key];
      if (!does) return;
      event.preventDefault();
      does();
    });
  }

  function listenToControls() {
    $("layer").append(...layers.map((one, value) => element("option", { value }, named(one))));
    listLayers();
    $("all").open = layers.length > 1 && innerWidth >= 1100;
    $("layer").addEventListener("change", (event) => toLayer(Number(event.target.value)));
    $("group").addEventListener("change", ({ target }) => change({ group: target.value === "" ? null : Number(target.value) }));
    $("scale").addEventListener("input", (event) => {
      play(false);
      change({ scale: Number(event.target.value) });
    });
    $("play").addEventListener("click", () => play(!state.playing));
    $("closer").addEventListener("click", () => zoomBy(2));
    $("wider").addEventListener("click", () => zoomBy(0.5));
    $("wider").disabled = true;
    $("reset").addEventListener("click", reset);
    $("remove").addEventListener("click", () => change({ at: [state.at[0], null], active: 0 }));
    for (const input of document.querySelectorAll("[name=position]")) {
      input.addEventListener("change", () => choose(Number(input.value)));
    }
    const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
    const showTheme = () => $("theme").setAttribute("aria-pressed", isDark());
    $("theme").addEventListener("click", () => {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      showTheme();
    });
    dark.addEventListener("change", showTheme);
    showTheme();
  }

  function trouble(text) {
    $("trouble").hidden = false;
    $("trouble").textContent = text;
  }

  function canUnpack() {
    try {
      return Boolean(new DecompressionStream("deflate-raw"));
    } catch {
      return false;
    }
  }

  async function begin() {
    if (!canUnpack()) {
      return trouble("This page unpacks its numbers with DecompressionStream, which this browser lacks. Chrome and Edge 103, Firefox 113 and Safari 16.4 have it, and what is newer.");
    }
    picture.src = image.src;
    await Promise.all([picture.decode(), ...layers.map(Rule.unpack)]);
    if (matchMedia("(hover: none)").matches) $("pointer").textContent = "Tap the picture to look from there.";
    listenToControls();
    listenToPointer();
    listenToKeys();
    new ResizeObserver(redraw).observe($("frame"));
    addEventListener("resize", redraw);
    showControls();
    showKey();
    showScale();
    showNumbers();
    showNote();
    scene.draw();
    return undefined;
  }

  const ready = begin().catch((error) => {
    trouble(`This page could not be shown: ${error.message || error}.`);
    throw error;
  });

  // For programs: where the drawn points are, in image pixels, and where an image position is on the canvas.
  window.deformconvLook = {
    ready,
    points(which = 0) {
      const [found, plain] = [scene.levelsOf(which, state.scale), scene.levelsOf(which, 0)];
      if (!found) return null;
      const pairs = (points) => points.y.map((y, i) => [y, points.x[i]]);
      const chain = Rule.stack(layers, state.layer, state.depth);
      return {
        layers: chain.map((one) => one.name), unit: unitOf(which), at: Rule.middle(layer(), unitOf(which)), points: pairs(found.points),
        weights: [...found.points.weight], counts: [...found.points.count], regular: pairs(plain.points), outside: [...found.points.away],
      };
    },
    onCanvas: ([y, x]) => [Draw.toY(state.view, y), Draw.toX(state.view, x)],
    get state() {
      return { ...state, milliseconds: scene.milliseconds };
    },
  };
})();

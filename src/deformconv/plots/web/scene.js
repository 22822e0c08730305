// What is drawn, from the page's state: how the picture lies on the canvases, its overlay, the marks of one or two positions.
const makeScene = (page, state, picture) => {
  const $ = (id) => document.getElementById(id);
  const COLOURS = ["#ffb000", "#5cc8ff"];
  const RADII = [0, 6, 3.6, 2.3]; // of points through 1, 2, 3 layers, in CSS pixels
  const { layers, image } = page;
  let drawnPicture = "";
  let scheduled = false;
  let milliseconds = 0;

  const layer = () => layers[state.layer];
  const unitOf = (which) => Rule.unitAt(layer(), state.at[which]);

  const margin = 0.035 * Math.max(image.width, image.height);
  const [width, height] = [image.width + 2 * margin, image.height + 2 * margin];
  const besideIt = () => innerWidth >= 860;
  const tallest = () => Math.max(besideIt() ? innerHeight - 250 : 0.62 * innerHeight, 220);

  // The picture's column is as wide as the picture at the height that the window leaves it, and the panel takes the rest.
  function arrange() {
    const room = document.querySelector("main").clientWidth - 346;
    const wanted = Math.min(Math.max((tallest() * width) / height, 440), room);
    document.documentElement.style.setProperty("--stage", besideIt() ? `${Math.floor(wanted)}px` : "minmax(0, 1fr)");
  }

  function view() {
    const wide = $("frame").clientWidth;
    const fit = Math.min(wide / width, tallest() / height);
    const found = { width: wide, height: Math.round(fit * height), ratio: Math.min(devicePixelRatio || 1, 3), k: fit * state.zoom };
    const side = [found.height / found.k, found.width / found.k];
    const corner = [0, 1].map((axis) => {
      const size = axis ? image.width : image.height;
      const all = size + 2 * margin;
      if (side[axis] >= all) return (size - 1) / 2 - side[axis] / 2;
      return Math.min(Math.max(state.centre[axis] - side[axis] / 2, -0.5 - margin), -0.5 - margin + all - side[axis]);
    });
    return { ...found, top: corner[0], left: corner[1] };
  }

  const cached = new Map();
  function levelsOf(which, scale) {
    if (!state.at[which]) return null;
    const unit = unitOf(which);
    const name = [state.layer, state.depth, state.group, unit, scale].join(" ");
    if (!cached.has(name)) {
      if (cached.size > 8) cached.clear();
      const chain = Rule.stack(layers, state.layer, state.depth);
      const levels = Rule.levels(chain, unit, scale, state.group);
      cached.set(name, levels && { levels, points: Rule.merged(levels.at(-1), chain.at(-1)) });
    }
    return cached.get(name);
  }

  const pointsOf = (which) => levelsOf(which, state.scale)?.points;

  function overlayKey() {
    const one = layer();
    if (state.overlay === "field") return one.fields ? Rule.nearestField(one, unitOf(state.active)) : "none";
    return state.overlay === "arrows" || state.overlay === "colours" ? state.scale : "";
  }

  const overlays = new Map();
  function overlayCells(name, make) {
    if (!overlays.has(name)) {
      if (overlays.size > 16) overlays.clear();
      overlays.set(name, make());
    }
    return overlays.get(name);
  }

  const largest = (values) => values.reduce((most, value) => (value > most ? value : most), 0);

  function flowLimit(one) {
    const flow = Rule.summary(one, state.group);
    flow.limit ??= largest(flow.y.map((y, place) => Math.hypot(y, flow.x[place]))) || 1;
    return flow.limit;
  }

  function drawPicture() {
    const one = layer();
    const key = [state.overlay, state.layer, state.group, overlayKey(), Object.values(state.view)].join(" ");
    if (key === drawnPicture) return;
    drawnPicture = key;
    const context = Draw.picture($("picture"), state.view, picture, image, state.overlay !== "none" && state.overlay !== "arrows");
    const step = one.unitStep.map((size) => size * one.every);
    const flow = Rule.summary(one, state.group);
    const map = (values, most) =>
      Draw.place(
        context, state.view,
        overlayCells([state.overlay, state.layer, state.group].join(" "), () =>
          Draw.heatCells(one.rows, one.columns, (place) => values[place] / most)), one.unitOrigin, step, false,
      );
    if (state.overlay === "arrows") Draw.arrows(context, state.view, one, flow, state.scale);
    if (state.overlay === "spread") map(flow.spread, largest(flow.spread) || 1);
    if (state.overlay === "mask" && flow.mask) map(flow.mask, largest(flow.mask) || 1);
    if (state.overlay === "colours") {
      const made = Draw.flowCells(one.rows, one.columns, flow.y, flow.x, flowLimit(one) / (state.scale || 1e-9));
      Draw.place(context, state.view, made, one.unitOrigin, step, false);
    }
    if (state.overlay === "field" && one.fields) drawField(context, one, Rule.nearestField(one, unitOf(state.active)));
    context.restore();
  }

  function drawField(context, one, chosen) {
    const [, height, width] = one.fields.shape;
    const made = overlayCells(`field ${state.layer} ${chosen}`, () =>
      Draw.heatCells(height, width, (place) => (one.heat[chosen * height * width + place] / 255) ** 0.5));
    Draw.place(context, state.view, made, one.fields.origin[chosen], one.fields.step, true);
    const at = Rule.middle(one, one.fields.units[chosen]);
    Draw.cell(context, state.view, at, one.unitStep, "#fff");
    Draw.circle(context, state.view, at, one.fields.radius[chosen], "#fff");
  }

  function drawMarks() {
    const context = Draw.sized($("marks"), state.view);
    const { view: seen } = state;
    const base = RADII[state.depth] * Math.min(Math.max(seen.width / 600, 0.8), 1.25) * state.zoom ** 0.25;
    let usual = 1;
    const order = state.active ? [0, 1] : [1, 0];
    const all = order.filter((which) => state.at[which]);
    if (state.depth > 1) {
      const points = pointsOf(0);
      usual = points ? points.weight.reduce((sum, weight) => sum + Math.abs(weight), 0) / points.length || 1 : 1;
    }
    for (const which of all) drawStack(context, seen, which, base, usual);
    for (const which of all) {
      Draw.middle(context, seen, Rule.middle(layer(), unitOf(which)), COLOURS[which], state.at[1] ? "AB"[which] : "");
    }
  }

  function drawStack(context, seen, which, base, usual) {
    const [found, plain] = [levelsOf(which, state.scale), levelsOf(which, 0)];
    if (!found) return;
    const { levels, points } = found;
    const colour = COLOURS[which];
    if (levels.length === 1) {
      const [level, regular] = [levels[0], plain.levels[0]];
      Draw.lines(context, seen, level, (i) => [regular.y[level.tap[i]], regular.x[level.tap[i]]], colour, 1.3, 0.9);
    } else {
      levels.slice(1).forEach((level, depth) => {
        const parent = levels[depth];
        const opacity = level.length > 2000 ? 0.12 : 0.3;
        Draw.lines(context, seen, level, (i) => [parent.y[level.of[i]], parent.x[level.of[i]]], colour, 0.8, opacity);
      });
    }
    Draw.plusses(context, seen, plain.points, ...(levels.length === 1 ? [4, 1] : [2, 0.6]));
    Draw.points(context, seen, points, colour, base, usual);
  }

  function draw() {
    scheduled = false;
    const begun = performance.now();
    arrange();
    const seen = view();
    state.view = seen;
    for (const canvas of [$("picture"), $("marks")]) {
      Object.assign(canvas.style, { width: `${seen.width}px`, height: `${seen.height}px` });
    }
    $("frame").style.height = `${seen.height}px`;
    drawPicture();
    drawMarks();
    milliseconds = performance.now() - begun;
  }

  function redraw() {
    if (!scheduled) requestAnimationFrame(draw);
    scheduled = true;
  }

  // The unit under the pointer is an element of its own: it moves with the pointer, and thousands of marks stay.
  function showPointed(unit) {
    const cell = $("cell");
    cell.hidden = !unit;
    if (!unit) return;
    const [y, x] = Rule.middle(layer(), unit);
    const [high, wide] = layer().unitStep.map((step) => Math.abs(step) * state.view.k);
    const [top, left] = [Draw.toY(state.view, y) - high / 2, Draw.toX(state.view, x) - wide / 2];
    Object.assign(cell.style, { top: `${top}px`, left: `${left}px`, width: `${wide}px`, height: `${high}px` });
  }

  return {
    layer, unitOf, levelsOf, pointsOf, flowLimit, largest, draw, redraw, showPointed,
    get milliseconds() {
      return milliseconds;
    },
  };
};

// Drawing on two canvases, the picture below and the marks above. A view says where an image position lies on them.
const Draw = (() => {
  const HALO = "rgba(8, 10, 16, 0.8)";
  const HEAT = [[0, 0, 4], [34, 17, 80], [95, 24, 127], [152, 45, 128], [211, 67, 110], [248, 118, 92], [254, 187, 129], [252, 253, 191]];
  const sprites = new Map();

  // A view of the image in `width` x `height` CSS pixels, `k` of them an image pixel; `left`, `top` are image positions.
  const toX = (view, x) => (x - view.left) * view.k;
  const toY = (view, y) => (y - view.top) * view.k;

  function sized(canvas, view) {
    const width = Math.round(view.width * view.ratio);
    const height = Math.round(view.height * view.ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.setTransform(view.ratio, 0, 0, view.ratio, 0, 0);
    context.clearRect(0, 0, view.width, view.height);
    return context;
  }

  function heatColour(part) {
    const place = Math.min(Math.max(part, 0), 1) * (HEAT.length - 1);
    const first = Math.min(Math.floor(place), HEAT.length - 2);
    return HEAT[first].map((value, channel) => value + (HEAT[first + 1][channel] - value) * (place - first));
  }

  // Hues of one lightness, so that no direction looks stronger than another (Oklab).
  function hueColour(angle) {
    const [L, a, b] = [0.76, 0.14 * Math.cos(angle), 0.14 * Math.sin(angle)];
    const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
    const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
    const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
    const linear = [
      4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
      -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
      -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
    ];
    return linear.map((value) => {
      const bounded = Math.min(Math.max(value, 0), 1);
      return 255 * (bounded <= 0.0031308 ? 12.92 * bounded : 1.055 * bounded ** (1 / 2.4) - 0.055);
    });
  }

  // A small canvas with a colour and an opacity for each cell; `paint(place)` returns [red, green, blue, opacity] or nothing.
  function cells(rows, columns, paint) {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: columns, height: rows });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    for (let place = 0; place < rows * columns; place++) {
      const colour = paint(place);
      if (!colour) continue;
      for (let channel = 0; channel < 3; channel++) pixels.data[4 * place + channel] = colour[channel];
      pixels.data[4 * place + 3] = 255 * colour[3];
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  // From nothing on, colours come in gradually, so that what there hardly is has no edge.
  function heatCells(rows, columns, value) {
    return cells(rows, columns, (place) => {
      const part = value(place);
      return part > 0 ? [...heatColour(part), 0.88 * Math.min(1.6 * part, 1)] : null;
    });
  }

  function flowCells(rows, columns, y, x, most) {
    return cells(rows, columns, (place) => {
      const length = Math.hypot(y[place], x[place]);
      return length > 0 ? [...hueColour(Math.atan2(y[place], x[place])), 0.9 * Math.min(length / most, 1) ** 0.6] : null;
    });
  }

  // Cells whose first middle is at `origin` and which are `step` image pixels large.
  function place(context, view, canvas, origin, step, smooth) {
    context.imageSmoothingEnabled = smooth;
    context.drawImage(
      canvas, toX(view, origin[1] - step[1] / 2), toY(view, origin[0] - step[0] / 2),
      canvas.width * step[1] * view.k, canvas.height * step[0] * view.k,
    );
  }

  function picture(canvas, view, image, size, grey) {
    const context = sized(canvas, view);
    const rectangle = [toX(view, -0.5), toY(view, -0.5), size.width * view.k, size.height * view.k];
    context.imageSmoothingEnabled = view.k * view.ratio * (size.width / image.naturalWidth) < 5;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, ...rectangle);
    if (grey) {
      context.globalCompositeOperation = "saturation";
      context.fillStyle = "#808080";
      context.fillRect(...rectangle);
      context.globalCompositeOperation = "source-over";
      context.fillStyle = "rgba(0, 0, 0, 0.3)";
      context.fillRect(...rectangle);
    }
    context.save();
    context.beginPath();
    context.rect(...rectangle);
    context.clip();
    return context;
  }

  function stroked(context, widths, colours) {
    context.lineCap = context.lineJoin = "round";
    widths.forEach((width, number) => {
      context.lineWidth = width;
      context.strokeStyle = colours[number];
      context.stroke();
    });
  }

  // The mean offset of every n-th unit at its true length, so that arrows do not cover each other's beginnings.
  function arrows(context, view, layer, flow, scale) {
    const apart = [0, 1].map((axis) => Math.max(Math.ceil(15 / (layer.unitStep[axis] * layer.every * view.k)), 1));
    const first = apart.map((every) => Math.floor(every / 2));
    context.beginPath();
    for (let row = Math.min(first[0], layer.rows - 1); row < layer.rows; row += apart[0]) {
      for (let column = Math.min(first[1], layer.columns - 1); column < layer.columns; column += apart[1]) {
        const [y, x] = Rule.middle(layer, [row * layer.every, column * layer.every]);
        const dx = flow.x[row * layer.columns + column] * scale * view.k;
        const dy = flow.y[row * layer.columns + column] * scale * view.k;
        const length = Math.hypot(dx, dy);
        const [x0, y0] = [toX(view, x), toY(view, y)];
        if (!(length < 4000)) continue;
        context.moveTo(x0, y0);
        context.lineTo(x0 + dx, y0 + dy);
        if (length < 2) continue;
        const head = Math.min(5, 0.6 * length) / length;
        context.moveTo(x0 + dx - head * (dx + 0.6 * dy), y0 + dy - head * (dy - 0.6 * dx));
        context.lineTo(x0 + dx, y0 + dy);
        context.lineTo(x0 + dx - head * (dx - 0.6 * dy), y0 + dy - head * (dy + 0.6 * dx));
      }
    }
    stroked(context, [3.6, 1.5], [HALO, "#fff"]);
  }

  // A disc with a halo, or a ring where a point reads nothing; kept as a picture, since thousands are drawn in a frame.
  function sprite(colour, radius, ratio, hollow, ringed) {
    const step = Math.round(radius * 4);
    const name = `${colour} ${step} ${ratio} ${hollow} ${ringed}`;
    if (sprites.has(name)) return sprites.get(name);
    const half = step / 4 + 2;
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = Math.ceil(2 * half * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const circle = (size) => {
      context.beginPath();
      context.arc(half, half, Math.max(size, 0.5), 0, 7);
    };
    if (hollow) {
      circle(step / 4);
      stroked(context, [3, 1.4], [HALO, colour]);
    } else {
      // A white ring in a dark one is legible on anything; small points have room for the dark one alone.
      const rings = ringed ? [[1.4, HALO], [0.4, "#fff"], [-0.7, colour]] : [[0.8, HALO], [0, colour]];
      for (const [more, fill] of rings) {
        circle(step / 4 + more);
        context.fillStyle = fill;
        context.fill();
      }
    }
    const made = { canvas, half };
    sprites.set(name, made);
    return made;
  }

  function points(context, view, level, colour, radius, usual) {
    for (let i = 0; i < level.length; i++) {
      const amount = level.away[i] ? 0.5 : Math.sqrt(Math.abs(level.weight[i]) / usual);
      const part = Math.min(Math.max(amount, 0.4), 1.7);
      const { canvas, half } = sprite(colour, radius * part, view.ratio, Boolean(level.away[i]), radius > 3.2);
      const [x, y] = [toX(view, level.x[i]), toY(view, level.y[i])];
      if (x > -half && y > -half && x < view.width + half && y < view.height + half) {
        context.drawImage(canvas, x - half, y - half, canvas.width / view.ratio, canvas.height / view.ratio);
      }
    }
  }

  function plusses(context, view, level, arm, opacity) {
    context.beginPath();
    for (let i = 0; i < level.length; i++) {
      const [x, y] = [toX(view, level.x[i]), toY(view, level.y[i])];
      context.moveTo(x - arm, y);
      context.lineTo(x + arm, y);
      context.moveTo(x, y - arm);
      context.lineTo(x, y + arm);
    }
    context.globalAlpha = opacity;
    stroked(context, [3, 1.2], [HALO, "#fff"]);
    context.globalAlpha = 1;
  }

  // Lines from one set of positions to another: `from` is asked for the beginning of each.
  function lines(context, view, level, from, colour, width, opacity) {
    context.beginPath();
    for (let i = 0; i < level.length; i++) {
      const [y, x] = from(i);
      context.moveTo(toX(view, x), toY(view, y));
      context.lineTo(toX(view, level.x[i]), toY(view, level.y[i]));
    }
    context.globalAlpha = opacity;
    stroked(context, width > 1 ? [width + 1.8, width] : [width], width > 1 ? [HALO, colour] : [colour]);
    context.globalAlpha = 1;
  }

  function middle(context, view, at, colour, letter) {
    const [x, y] = [toX(view, at[1]), toY(view, at[0])];
    context.beginPath();
    for (const side of [-1, 1]) {
      context.moveTo(x - 5, y - 5 * side);
      context.lineTo(x + 5, y + 5 * side);
    }
    stroked(context, [5, 2.4], [HALO, "#f0e442"]);
    if (!letter) return;
    context.font = "700 13px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.beginPath();
    context.arc(x + 17, y - 17, 10, 0, 7);
    context.fillStyle = HALO;
    context.fill();
    context.fillStyle = colour;
    context.fillText(letter, x + 17, y - 16.5);
  }

  function cell(context, view, at, step, colour) {
    context.beginPath();
    context.rect(toX(view, at[1] - step[1] / 2), toY(view, at[0] - step[0] / 2), step[1] * view.k, step[0] * view.k);
    context.setLineDash([5, 4]);
    stroked(context, [3, 1.4], [HALO, colour]);
    context.setLineDash([]);
  }

  function circle(context, view, at, radius, colour) {
    context.beginPath();
    context.arc(toX(view, at[1]), toY(view, at[0]), radius * view.k, 0, 7);
    context.setLineDash([6, 5]);
    stroked(context, [3, 1.4], [HALO, colour]);
    context.setLineDash([]);
  }

  // What the colours over the picture mean: a bar, or a wheel.
  function key(canvas, ratio, wheel) {
    const [width, height] = wheel ? [44, 44] : [110, 14];
    const context = sized(canvas, { width, height, ratio });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    if (wheel) {
      const size = 44 * 2;
      const disc = flowCells(
        size, size, Array.from({ length: size * size }, (_, i) => Math.floor(i / size) - size / 2 + 0.5),
        Array.from({ length: size * size }, (_, i) => (i % size) - size / 2 + 0.5), size / 2,
      );
      context.beginPath();
      context.arc(22, 22, 21.5, 0, 7);
      context.fillStyle = "#444";
      context.fill();
      context.clip();
      context.drawImage(disc, 0, 0, 44, 44);
    } else {
      context.fillStyle = "#444";
      context.fillRect(0, 0, width, height);
      context.drawImage(heatCells(1, width, (i) => (i + 0.5) / width), 0, 0, width, height);
    }
  }

  return { toX, toY, sized, picture, place, heatCells, flowCells, arrows, points, plusses, lines, middle, cell, circle, key };
})();

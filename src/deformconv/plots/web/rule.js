"use strict";
// What the document holds, and where units sample: numbers alone. Positions are y before x; cells are whole at their middles.
const Rule = (() => {
  const ARRAYS = { int8: Int8Array, int16: Int16Array, int32: Int32Array, uint8: Uint8Array };
  const MOST_PATHS = 60000; // a picture of more is a blot, and takes longer than a frame
  const SAME = 1e6; // points that agree to a millionth of a pixel are one

  async function unpacked(stored) {
    const packed = Uint8Array.from(atob(stored.data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const type = ARRAYS[stored.dtype];
    const width = type.BYTES_PER_ELEMENT;
    const count = bytes.length / width;
    const joined = new Uint8Array(bytes.length);
    for (let part = 0; part < width; part++) {
      for (let i = 0; i < count; i++) joined[i * width + part] = bytes[part * count + i];
    }
    return new type(joined.buffer);
  }

  // Adds to a layer of the document its numbers, and where its output units lie in the image.
  async function unpack(layer) {
    layer.offsets = await unpacked(layer.offset);
    layer.masks = layer.mask && (await unpacked(layer.mask));
    layer.heat = layer.fields && (await unpacked(layer.fields));
    layer.missing = -(2 ** (8 * layer.offsets.BYTES_PER_ELEMENT - 1));
    const taps = layer.kernel[0] * layer.kernel[1];
    layer.taps = taps;
    layer.rows = layer.offset.shape[3];
    layer.columns = layer.offset.shape[4];
    layer.unitStep = [0, 1].map((axis) => layer.step[axis] * layer.stride[axis]);
    layer.unitOrigin = [0, 1].map(
      (axis) =>
        layer.origin[axis] +
        layer.step[axis] * (-layer.padding[axis] + (layer.dilation[axis] * (layer.kernel[axis] - 1)) / 2),
    );
    layer.tap = Array.from({ length: taps }, (_, k) => [
      Math.floor(k / layer.kernel[1]) * layer.dilation[0] - layer.padding[0],
      (k % layer.kernel[1]) * layer.dilation[1] - layer.padding[1],
    ]);
    layer.summaries = new Map();
    return layer;
  }

  // The unit nearest to an image position, of those whose offsets were kept.
  function unitAt(layer, at) {
    return [0, 1].map((axis) => {
      const kept = axis ? layer.columns : layer.rows;
      const place = Math.round((at[axis] - layer.unitOrigin[axis]) / layer.unitStep[axis] / layer.every);
      return Math.min(Math.max(place, 0), kept - 1) * layer.every;
    });
  }

  function middle(layer, unit) {
    return [0, 1].map((axis) => layer.unitOrigin[axis] + layer.unitStep[axis] * unit[axis]);
  }

  function chosenGroups(layer, group) {
    return group === null || group >= layer.groups ? [...Array(layer.groups).keys()] : [group];
  }

  const bounded = (value, last) => Math.min(Math.max(value, 0), last);

  // The share of a linear interpolation that lies within `size` cells.
  function within(position, size) {
    const first = Math.floor(position);
    const fraction = position - first;
    return (first >= 0 && first < size ? 1 - fraction : 0) + (first + 1 >= 0 && first + 1 < size ? fraction : 0);
  }

  // Up to 4 units around a position in output cells, those within the map, as indices of kept places and their weights.
  function corners(layer, y, x, places, weights) {
    if (!(y > -1 && x > -1 && y < layer.output[0] && x < layer.output[1])) return 0;
    const share = within(y, layer.output[0]) * within(x, layer.output[1]);
    // Kept places are `every` units apart; what lies beyond the last of them is as the last, since it is averaged alone.
    const row = y / layer.every;
    const column = x / layer.every;
    const top = Math.floor(row);
    const left = Math.floor(column);
    let count = 0;
    let sum = 0;
    for (let corner = 0; corner < 4; corner++) {
      const r = top + (corner >> 1);
      const c = left + (corner & 1);
      if (r < 0 || c < 0 || r >= layer.rows || c >= layer.columns) continue;
      const weight = (corner >> 1 ? row - top : 1 - row + top) * (corner & 1 ? column - left : 1 - column + left);
      if (!weight) continue;
      places[count] = r * layer.columns + c;
      weights[count++] = weight;
      sum += weight;
    }
    for (let corner = 0; corner < count; corner++) weights[corner] *= share / sum;
    return count;
  }

  // The samples of a layer at positions in its output cells: image positions, weights, and which position each is of.
  function sampled(layer, from, scale, group) {
    const groups = chosenGroups(layer, group);
    const plane = layer.rows * layer.columns;
    const most = from.length * groups.length * layer.taps;
    const to = {
      y: new Float64Array(most), x: new Float64Array(most), weight: new Float64Array(most),
      of: new Int32Array(most), tap: new Int32Array(most), away: new Uint8Array(most), length: 0,
    };
    const places = new Int32Array(4);
    const weights = new Float64Array(4);
    const [height, width] = layer.reads.size;
    const [above, left] = layer.reads.before;
    for (let i = 0; i < from.length; i++) {
      const count = corners(layer, from.y[i], from.x[i], places, weights);
      let share = 0;
      for (let corner = 0; corner < count; corner++) share += weights[corner];
      if (!share) continue;
      // The units inside, averaged alone, stand at the nearest position on the map.
      const baseY = bounded(from.y[i], layer.output[0] - 1) * layer.stride[0];
      const baseX = bounded(from.x[i], layer.output[1] - 1) * layer.stride[1];
      for (const g of groups) {
        for (let k = 0; k < layer.taps; k++) {
          const first = (g * layer.taps + k) * 2 * plane;
          let dy = 0;
          let dx = 0;
          let mask = 0;
          for (let corner = 0; corner < count; corner++) {
            const place = places[corner];
            const offsetY = layer.offsets[first + place];
            const offsetX = layer.offsets[first + plane + place];
            const lost = offsetY === layer.missing || offsetX === layer.missing;
            dy += weights[corner] * (lost ? NaN : offsetY);
            dx += weights[corner] * (lost ? NaN : offsetX);
            mask += weights[corner] * (layer.masks ? layer.masks[(g * layer.taps + k) * plane + place] : 1);
          }
          const size = layer.offset.scale / share;
          const y = baseY + layer.tap[k][0] + (scale ? scale * size * dy : 0);
          const x = baseX + layer.tap[k][1] + (scale ? scale * size * dx : 0);
          if (y !== y || x !== x) continue; // a NaN reads nothing that can be shown
          const next = to.length++;
          to.y[next] = layer.origin[0] + layer.step[0] * y;
          to.x[next] = layer.origin[1] + layer.step[1] * x;
          to.weight[next] = from.weight[i] * mask * (layer.masks ? layer.mask.scale : 1);
          to.of[next] = i;
          to.tap[next] = (g - groups[0]) * layer.taps + k;
          to.away[next] = y + above > -1 && x + left > -1 && y + above < height && x + left < width ? 0 : 1;
        }
      }
    }
    return to;
  }

  function toUnits(layer, level) {
    const { length } = level;
    const from = { y: new Float64Array(length), x: new Float64Array(length), weight: level.weight, length };
    for (let i = 0; i < length; i++) {
      from.y[i] = (level.y[i] - layer.unitOrigin[0]) / layer.unitStep[0];
      from.x[i] = (level.x[i] - layer.unitOrigin[1]) / layer.unitStep[1];
    }
    return from;
  }

  // The layers that a stack of `depth` goes through, the top one first: before each the nearest that it sees, if there is one.
  function stack(layers, number, depth) {
    const chain = [layers[number]];
    while (chain.length < depth && chain.at(-1).before.length) chain.push(layers[chain.at(-1).before[0]]);
    return chain;
  }

  // An offset group is the top layer's: what the layers before it read is mixed by then.
  function paths(chain, group) {
    return chain.reduce((product, layer, depth) => product * layer.taps * chosenGroups(layer, depth ? null : group).length, 1);
  }

  // Every level of a stack, from a unit of its top layer: `levels[0]` are that layer's samples. None where there are too many.
  function levels(chain, unit, scale, group) {
    if (paths(chain, group) > MOST_PATHS) return null;
    let from = { y: [unit[0]], x: [unit[1]], weight: [1], length: 1 };
    return chain.map((layer, depth) => {
      const level = sampled(layer, depth ? toUnits(layer, from) : from, scale, depth ? null : group);
      from = level;
      return level;
    });
  }

  // Points that coincide become one, whose weight is the sum of theirs. What hangs over the map's edge weighs less.
  function merged(level, layer) {
    const { before, size } = layer.reads;
    const inside = (position, axis) =>
      within((position - layer.origin[axis]) / layer.step[axis] + before[axis], size[axis]);
    const found = new Map();
    const points = { y: [], x: [], weight: [], count: [], away: [], length: 0 };
    for (let i = 0; i < level.length; i++) {
      const key = `${Math.round(level.y[i] * SAME)},${Math.round(level.x[i] * SAME)}`;
      const at = found.get(key);
      const weight = level.weight[i] * inside(level.y[i], 0) * inside(level.x[i], 1);
      if (at === undefined) {
        found.set(key, points.length++);
        points.y.push(level.y[i]);
        points.x.push(level.x[i]);
        points.weight.push(weight);
        points.count.push(1);
        points.away.push(level.away[i]);
      } else {
        points.weight[at] += weight;
        points.count[at]++;
      }
    }
    return points;
  }

  // Of every kept unit: mean offset and spread in image pixels, mean mask, share of samples that read nothing.
  function summary(layer, group) {
    const groups = chosenGroups(layer, group);
    const name = groups.join();
    if (layer.summaries.has(name)) return layer.summaries.get(name);
    const plane = layer.rows * layer.columns;
    const made = () => new Float32Array(plane);
    const found = { y: made(), x: made(), spread: made(), mask: layer.masks && made(), outside: made() };
    const samples = groups.length * layer.taps;
    const { before, size } = layer.reads;
    const squares = made();
    const [scaleY, scaleX] = layer.step.map((step) => step * layer.offset.scale);
    for (const g of groups) {
      for (let k = 0; k < layer.taps; k++) {
        const first = (g * layer.taps + k) * 2 * plane;
        for (let place = 0; place < plane; place++) {
          const rawY = layer.offsets[first + place];
          const rawX = layer.offsets[first + plane + place];
          const lost = rawY === layer.missing || rawX === layer.missing;
          const y = lost ? NaN : rawY * scaleY;
          const x = lost ? NaN : rawX * scaleX;
          found.y[place] += y / samples;
          found.x[place] += x / samples;
          squares[place] += (y * y + x * x) / samples;
          if (layer.masks) {
            found.mask[place] += (layer.masks[(g * layer.taps + k) * plane + place] * layer.mask.scale) / samples;
          }
          const row = Math.floor(place / layer.columns) * layer.every * layer.stride[0] + layer.tap[k][0];
          const column = (place % layer.columns) * layer.every * layer.stride[1] + layer.tap[k][1];
          const inY = row + rawY * layer.offset.scale + before[0];
          const inX = column + rawX * layer.offset.scale + before[1];
          if (!(inY > -1 && inX > -1 && inY < size[0] && inX < size[1])) found.outside[place] += 1 / samples;
        }
      }
    }
    for (let place = 0; place < plane; place++) {
      found.spread[place] = Math.sqrt(Math.max(squares[place] - found.y[place] ** 2 - found.x[place] ** 2, 0));
    }
    layer.summaries.set(name, found);
    return found;
  }

  // The receptive field of the unit nearest to one, of those that are in the document: its number.
  function nearestField(layer, unit) {
    let best = 0;
    const distance = (other) => (other[0] - unit[0]) ** 2 + (other[1] - unit[1]) ** 2;
    layer.fields.units.forEach((other, number) => {
      if (distance(other) < distance(layer.fields.units[best])) best = number;
    });
    return best;
  }

  return { unpack, unitAt, middle, stack, paths, levels, merged, summary, nearestField, MOST_PATHS };
})();

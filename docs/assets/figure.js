// The lesson's figure: QAM on the bandit of experiments/closed_form.py, in two dimensions.
// First the mathematics, named as in qam_offline.py; then the drawing. A vector is [x, y].
"use strict";

const STD = 0.15;
const MEANS = [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]];
const SLOPE = [2.0, 0.7]; // Q(a) = SLOPE a - |a|^2 / 2
const HALF = 2.0; // the picture shows -HALF .. HALF
const FIRST_SEED = 2; // its path and arrows stay in the picture, whatever T is

const add = (a, b) => [a[0] + b[0], a[1] + b[1]];
const scale = (c, a) => [c * a[0], c * a[1]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
const norm = (a) => Math.hypot(a[0], a[1]);

// ------------------------------------------------------------------------------ the mathematics

function behavior() {
  return { means: MEANS, std: STD, logWeights: [0, 0, 0, 0] };
}

// behavior(a) exp(invTemp Q(a)) / Z: a mixture again.
function target(invTemp) {
  const precision = 1 / STD ** 2 + invTemp;
  const means = MEANS.map((m) => add(scale(1 / STD ** 2, m), scale(invTemp, SLOPE)))
    .map((m) => scale(1 / precision, m));
  const logWeights = means.map(
    (m, k) => (precision * dot(m, m)) / 2 - dot(MEANS[k], MEANS[k]) / (2 * STD ** 2),
  );
  return { means, std: precision ** -0.5, logWeights };
}

// How likely each peak is, seen from x at time t.
function responsibilities(mixture, x, t) {
  const variance = (1 - t) ** 2 + t ** 2 * mixture.std ** 2;
  const logs = mixture.means.map((m, k) => {
    const away = add(x, scale(-t, m));
    return mixture.logWeights[k] - dot(away, away) / (2 * variance);
  });
  const largest = Math.max(...logs);
  const weights = logs.map((log) => Math.exp(log - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

// The parts of the velocity: what each peak says, and how that changes with x.
function partsOfVelocity(mixture, x, t) {
  const variance = (1 - t) ** 2 + t ** 2 * mixture.std ** 2;
  const slope = (t * mixture.std ** 2 - (1 - t)) / variance;
  const aways = mixture.means.map((m) => add(x, scale(-t, m)));
  const says = mixture.means.map((m, k) => add(m, scale(slope, aways[k])));
  return { variance, slope, aways, says, weights: responsibilities(mixture, x, t) };
}

function velocity(mixture, x, t) {
  const { says, weights } = partsOfVelocity(mixture, x, t);
  return says.reduce((sum, one, k) => add(sum, scale(weights[k], one)), [0, 0]);
}

// (d velocity / dx)^T g
function pullBackVelocity(mixture, x, t, g) {
  const { variance, slope, aways, says, weights } = partsOfVelocity(mixture, x, t);
  const mean = aways.reduce((sum, away, k) => add(sum, scale(weights[k], away)), [0, 0]);
  let product = scale(slope, g);
  says.forEach((one, k) => {
    const change = scale(1 / variance, add(mean, scale(-1, aways[k]))); // of log weight k
    product = add(product, scale(weights[k] * dot(one, g), change));
  });
  return product;
}

const drift = (mixture, x, t, u) => add(scale(2, velocity(mixture, x, t)), scale(-1 / u, x));
const memorylessSigma = (t, h) => Math.sqrt((2 * (1 - t + h)) / (t + h));
const gradientOfQ = (a) => add(SLOPE, scale(-1, a));

// Equation (4): noise is x_0 and T-1 draws.
function sampleMemorylessSde(policy, base, noise) {
  const T = noise.length;
  const h = 1 / T;
  const xs = [noise[0]];
  for (let i = 0; i < T - 1; i++) {
    const mean = add(xs[i], scale(h, drift(policy, xs[i], i * h, i * h + h)));
    xs.push(add(mean, scale(Math.sqrt(h) * memorylessSigma(i * h, h), noise[i + 1])));
  }
  xs.push(add(xs[T - 1], scale(h, velocity(base, xs[T - 1], 1 - h))));
  return xs;
}

// Equation (3), all states.
function sampleOde(mixture, x0, T) {
  const xs = [x0];
  for (let i = 0; i < T; i++) xs.push(add(xs[i], scale(1 / T, velocity(mixture, xs[i], i / T))));
  return xs;
}

// Equation (5): g_0 .. g_{T-1}.
function leanAdjoint(base, xs, g) {
  const T = xs.length - 1;
  const h = 1 / T;
  const adjoints = [];
  for (let i = T - 1; i >= 0; i--) {
    const u = i * h + h;
    const product = add(scale(2, pullBackVelocity(base, xs[i], u, g)), scale(-1 / u, g));
    g = add(g, scale(h, product));
    adjoints.unshift(g);
  }
  return adjoints;
}

// Backpropagation through the plain steps: the gradient of -invTemp Q at the end, at each state.
function backpropagate(mixture, xs, g) {
  const T = xs.length - 1;
  const gradients = [];
  for (let i = T - 1; i >= 0; i--) {
    g = add(g, scale(1 / T, pullBackVelocity(mixture, xs[i], i / T, g)));
    gradients.unshift(g);
  }
  return gradients;
}

// Equation (6), for one path.
function adjointMatchingLoss(policy, base, xs, adjoints) {
  const T = adjoints.length;
  const h = 1 / T;
  return adjoints.reduce((sum, g, i) => {
    const t = i * h;
    const difference = add(drift(policy, xs[i], t, t + h), scale(-1, drift(base, xs[i], t, t + h)));
    const sigma = memorylessSigma(t, h);
    const residual = add(scale(1 / sigma, difference), scale(sigma, g));
    return sum + dot(residual, residual);
  }, 0);
}

// All that the figure shows, from what its controls say.
function compute(invTemp, noise) {
  const T = noise.length;
  const base = behavior();
  const policy = target(invTemp);
  const xs = sampleMemorylessSde(base, base, noise);
  const g = scale(-invTemp, gradientOfQ(xs[T]));
  const adjoints = leanAdjoint(base, xs, g);
  const plain = sampleOde(base, noise[0], T);
  const plainG = scale(-invTemp, gradientOfQ(plain[T]));
  return {
    xs,
    adjoints,
    g,
    sigmas: adjoints.map((_, i) => memorylessSigma(i / T, 1 / T)),
    loss: adjointMatchingLoss(policy, base, xs, adjoints),
    velocities: adjoints.map((_, i) => velocity(base, xs[i], i / T)),
    // Where (6) is 0 on this path: drifts differ by -sigma^2 g, and a drift has 2 v.
    targetVelocities: adjoints.map((one, i) =>
      add(velocity(base, xs[i], i / T), scale(-(memorylessSigma(i / T, 1 / T) ** 2) / 2, one)),
    ),
    plain,
    gradients: backpropagate(base, plain, plainG),
    policyPath: sampleOde(policy, noise[0], T),
  };
}

// Normal numbers that a seed gives anywhere (mulberry32, Box-Muller).
function draws(seed, count) {
  let state = seed;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let z = Math.imul(state ^ (state >>> 15), 1 | state);
    z = (z + Math.imul(z ^ (z >>> 7), 61 | z)) ^ z;
    return ((z ^ (z >>> 14)) >>> 0) / 4294967296;
  };
  return Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    const angle = 2 * Math.PI * uniform();
    return [radius * Math.cos(angle), radius * Math.sin(angle)];
  });
}

// ---------------------------------------------------------------------------------- the drawing

function startFigure(root) {
  const find = (name) => root.querySelector(`[data-figure="${name}"]`);
  const canvas = find("canvas");
  const pen = canvas.getContext("2d");
  const COLORS = { path: "#888888", adjoint: "#b35806", velocity: "#2b83ba", policy: "#542788" };
  const KEPT = 40; // draws, of which T are used
  let seed = FIRST_SEED;
  let timer = null;
  let shown = null;

  const toPixels = (x) => [
    ((x[0] + HALF) / (2 * HALF)) * canvas.width,
    ((HALF - x[1]) / (2 * HALF)) * canvas.height,
  ];

  function line(points, color, width) {
    pen.strokeStyle = color;
    pen.lineWidth = width;
    pen.beginPath();
    points.map(toPixels).forEach((p, i) => (i ? pen.lineTo(...p) : pen.moveTo(...p)));
    pen.stroke();
  }

  function disk(x, radius, color, alpha) {
    pen.globalAlpha = alpha;
    pen.fillStyle = color;
    pen.beginPath();
    pen.arc(...toPixels(x), radius, 0, 2 * Math.PI);
    pen.fill();
    pen.globalAlpha = 1;
  }

  function arrow(from, by, color) {
    const [x0, y0] = toPixels(from);
    const [x1, y1] = toPixels(add(from, by));
    const angle = Math.atan2(y1 - y0, x1 - x0);
    line([from, add(from, by)], color, 3);
    pen.beginPath();
    for (const side of [-0.45, 0.45]) {
      pen.moveTo(x1, y1);
      pen.lineTo(x1 - 12 * Math.cos(angle + side), y1 - 12 * Math.sin(angle + side));
    }
    pen.stroke();
  }

  function drawMixtures(invTemp) {
    const radius = (std) => (2 * std * canvas.width) / (2 * HALF);
    const wanted = target(invTemp);
    const weights = responsibilities(wanted, [0, 0], 0); // at t = 0 nothing is known of x_1
    wanted.means.forEach((m, k) => disk(m, radius(wanted.std), COLORS.policy, 0.6 * weights[k]));
    pen.strokeStyle = COLORS.path;
    pen.lineWidth = 1.5;
    for (const m of MEANS) {
      pen.beginPath();
      pen.arc(...toPixels(m), radius(STD), 0, 2 * Math.PI);
      pen.stroke();
    }
  }

  function draw() {
    const invTemp = Number(find("invTemp").value);
    const T = Number(find("T").value);
    find("time").max = T;
    const i = Math.min(Number(find("time").value), T);
    const back = find("backpropagation").checked;
    shown = compute(invTemp, draws(seed, KEPT).slice(0, T));

    pen.clearRect(0, 0, canvas.width, canvas.height);
    drawMixtures(invTemp);
    const path = back ? shown.plain : shown.xs;
    const ways = back ? shown.gradients : shown.adjoints;
    line(path.slice(0, i + 1), COLORS.path, 2);
    path.slice(0, i + 1).forEach((x) => disk(x, 4, COLORS.path, 1));
    // Once the path is at its end, the gradient has come back along all of it.
    if (i === T) ways.forEach((g, j) => arrow(path[j], scale(-0.25, g), COLORS.adjoint));
    if (i < T && !back) {
      arrow(path[i], scale(0.4, shown.velocities[i]), COLORS.velocity);
      arrow(path[i], scale(0.4, shown.targetVelocities[i]), COLORS.policy);
    }
    line(shown.policyPath, COLORS.policy, 2);
    disk(shown.policyPath[T], 7, COLORS.policy, 1);

    find("invTempValue").textContent = invTemp.toFixed(1);
    find("TValue").textContent = T;
    find("timeValue").textContent = (i / T).toFixed(2);
    const size = norm(i < T ? ways[i] : scale(-invTemp, gradientOfQ(path[T])));
    const what = back ? "gradient through the plain steps" : "adjoint";
    find("numbers").textContent =
      `size of the ${what} here: ${size.toFixed(3)};  ` +
      `L_AM of the optimal policy on this path: ${shown.loss.toFixed(3)}`;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    find("play").textContent = "Play";
  }

  function play() {
    if (timer) return stop();
    const slider = find("time");
    if (slider.value === slider.max) slider.value = 0;
    find("play").textContent = "Stop";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      draw();
      if (slider.value === slider.max) stop();
    }, 250);
  }

  for (const name of ["invTemp", "T", "time", "backpropagation"]) {
    find(name).addEventListener("input", draw);
  }
  find("play").addEventListener("click", play);
  find("noise").addEventListener("click", () => {
    seed += 1;
    draw();
  });
  draw();
  root.figureState = () => ({ ...shown, noise: draws(seed, KEPT).slice(0, shown.sigmas.length) });
}

if (typeof module !== "undefined") {
  module.exports = { compute, draws, FIRST_SEED, HALF };
} else {
  document.querySelectorAll("[data-figure-root]").forEach(startFigure);
}

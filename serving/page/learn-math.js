// The few functions that the lessons compute with.

export const sigmoid = (z) => 1 / (1 + Math.exp(-z));

export const sum = (numbers) => numbers.reduce((total, value) => total + value, 0);
export const mean = (numbers) => sum(numbers) / numbers.length;
export const dot = (a, b) => a.reduce((total, value, i) => total + value * b[i], 0);

// The largest score is moved to 0 first, so that nothing overflows; a score of -Infinity gets a weight of exactly 0.
export function softmax(scores, temperature = 1) {
  const largest = Math.max(...scores), powers = scores.map((score) => Math.exp((score - largest) / temperature));
  return powers.map((power) => power / sum(powers));
}

// The weighted average of vectors.
export const mix = (weights, vectors) => vectors[0].map((_, i) => sum(weights.map((weight, j) => weight * vectors[j][i])));

export const steps = (low, high, count) => Array.from({ length: count }, (_, i) => low + ((high - low) * i) / (count - 1));

// A generator of pseudorandom numbers between 0 and 1 (mulberry32): every visitor sees the same numbers.
export function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// The vector of length 1 in the same direction.
export const unit = (vector) => vector.map((value) => value / Math.sqrt(dot(vector, vector)));

// A vector of normally distributed numbers with a given standard deviation (Box-Muller).
export const normalVector = (length, uniform, deviation = 1) =>
  Array.from({ length }, () => deviation * Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));

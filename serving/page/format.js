// Format numbers and tokens for display.

export const integer = (number) => number.toLocaleString("en");

// Four digits, without trailing zeros.
export const number = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "∞");

export const percent = (share) =>
  share >= 0.9995 ? "100%" : share >= 0.1 ? `${(100 * share).toFixed(1)}%` : share >= 1e-4 ? `${(100 * share).toPrecision(2)}%` : share > 0 ? "<0.01%" : "0";

export const lossText = (loss) => (loss == null ? "–" : Math.abs(loss) >= 0.001 || !loss ? loss.toFixed(3) : loss.toExponential(2));

export const duration = (seconds) =>
  seconds < 60 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`
    : seconds < 3600 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`
      : `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;

// A token with its whitespace made visible.
const SYMBOLS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
export const visible = (text) => text.replace(/[ \n\t\r]/g, (character) => SYMBOLS[character]) || "∅";

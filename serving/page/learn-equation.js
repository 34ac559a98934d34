// Equations of the lessons in MathML, from a short notation:
//   x_i, x_{t-1}, x^2   scripts         {a}/{b}   a fraction         sqrt{a}   a root
// A single letter is a variable, a longer word a function's name, and "text" is text.

const MATHML = "http://www.w3.org/1998/Math/MathML";
const TOKEN = /"[^"]*"|[\p{L}\p{M}]+|\d[\d.,]*\d|\S/gu;

function node(tag, ...children) {
  const element = document.createElementNS(MATHML, tag);
  element.append(...children);
  return element;
}

// Remove the next operand from the tokens: a group, a root or a symbol.
function operand(tokens) {
  const token = tokens.shift();
  if (token === "{") {
    const group = node("mrow", ...expression(tokens));
    tokens.shift(); // the closing brace
    return group;
  }
  if (token === "sqrt") return node("msqrt", operand(tokens));
  if (token.startsWith('"')) return node("mtext", token.slice(1, -1));
  if (/^\p{L}/u.test(token)) return node("mi", token);
  if (/^\d/.test(token)) return node("mn", token);
  const operator = node("mo", token === "-" ? "−" : token);
  if ("()|".includes(token)) operator.setAttribute("stretchy", "false");
  return operator;
}

const isOperator = (element) => element.localName === "mo" && element.textContent !== ")";

function expression(tokens) {
  const nodes = [];
  while (tokens.length && tokens[0] !== "}") {
    const [token, next] = tokens, tag = { _: "msub", "^": "msup", "/": "mfrac" }[token];
    if (tag) {
      tokens.shift();
      nodes.push(node(tag, nodes.pop(), operand(tokens)));
    } else {
      // A function's name stands apart from what precedes it, and from an argument without parentheses.
      const isName = /^\p{L}[\p{L}\p{M}]/u.test(token) && token !== "sqrt";
      if (isName && nodes.length && !isOperator(nodes.at(-1))) nodes.push(space());
      nodes.push(operand(tokens));
      if (isName && /^[\p{L}\d{]/u.test(next ?? "")) nodes.push(space());
    }
  }
  return nodes;
}

function space() {
  const element = node("mspace");
  element.setAttribute("width", "0.2em");
  return element;
}

export function equation(notation) {
  const math = node("math", ...expression(notation.match(TOKEN)));
  math.setAttribute("display", "block");
  return math;
}

"""The outcome reward: is a mathematical answer right, which share of its tests does a program pass?

    python verify.py responses.jsonl                  # fields response, task, reference; writes responses.scores.jsonl
    python verify.py --answer '\\frac12' --gold 0.5     # True or False
"""
import argparse
import builtins
import cmath
import contextlib
import ctypes
import functools
import gc
import inspect
import json
import math
import os
import platform
import queue
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import reduce
from pathlib import Path

# ----------------------------------------------------------------------------------------------------------------------
# Math. Text never becomes code: an answer is cut into tokens and a recursive-descent parser makes a tree of them. Two
# trees are compared by kind: lists, tuples, intervals, matrices, relations, values. Values are exact as long as they
# are rational, else floats at random points; sympy has the last word on constants and wherever floats agree only nearly.

MAX_LENGTH = 3000  # characters of an answer that is parsed; longer ones are compared as text
MAX_DEPTH = 40  # nested groups
MAX_BITS = 10_000  # of a numerator or denominator: 3,000 digits
MAX_ITEMS = 50  # elements of a list or set

def extract_answer(response: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, `\fbox{...}` or `\boxed 5`; None if that is unclosed or missing."""
    *before, rest = re.split(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", response)
    if not before or not rest.startswith("{"):
        bare = re.match(r"[^\s${}]+", rest)
        return bare[0].rstrip(".,;") if before and bare else None
    depth = 0
    for mark in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace is content
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return rest[1:mark.start()].strip()
    return None

# --- Tokens -----------------------------------------------------------------------------------------------------------

SPELLINGS = {  # tokens, and how else they are spelled
    r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom \tbinom", r"\sqrt": "√ sqrt", "π": r"\pi pi", "±": r"\pm",
    "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "<": r"\lt", ">": r"\gt", "≠": r"\ne \neq !=",
    "=": "==", "≈": r"\approx", "∈": r"\in", "*": r"\cdot \times \ast · × ⋅", "/": r"\div ÷", "-": "− –", "^": "**",
    "∓": r"\mp", "^ 2": "²", "^ 3": "³", "unit °": r"° \circ \degree degrees degree", "∞": r"\infty oo inf",
    "unit %": r"% \% percent percentage pct", "∪": r"\cup", r"\{": r"\lbrace", r"\}": r"\rbrace", ",": "or and",
    r"\{ \}": r"\emptyset \varnothing ∅", "|": r"\mid \vert \lvert \rvert", "(": r"⟨ \langle", ")": r"⟩ \rangle",
    "* 1000": "thousand", "* 1000000": "million"}
SPELLINGS = {name: re.split("(?<!unit) ", tokens) for tokens, names in SPELLINGS.items() for name in names.split()}
SKIPPED = set(r". $ \$ € £ ¥ ~ \, \; \: \! \( \) \[ \] \quad \qquad \left \right \big \Big \bigl \bigr \Bigl \Bigr "
              r"\limits \boxed \displaystyle \mathbf \mathit \mathcal \boldsymbol".split()) | {"\\ ", "\\\n"}
SYMBOLS = ("alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi "
           "chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell angle triangle "
           "sum prod vec bar hat overline overrightarrow")  # sums and accents count as factors
SYMBOLS = {"∞"} | {"\\" + name for name in SYMBOLS.split()}
INVERSES = {name: "a" + name for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
RECIPROCALS = {"sec": "cos", "csc": "sin", "cot": "tan"}
FUNCTIONS = {name: name for name in [*INVERSES, *INVERSES.values(), *RECIPROCALS, "exp", "log", "ln", "lg"]}
FUNCTIONS |= {"arc" + name: inverse for name, inverse in INVERSES.items()}
UNITS = {unit: unit for unit in "ft in m cm mm km g kg mg h min s mi yd mph lb L ml mL N J W V Hz kW".split()}
UNITS |= {"feet": "ft", "foot": "ft", "inch": "in", "meter": "m", "centimeter": "cm", "kilometer": "km", "gram": "g",
          "kilogram": "kg", "hour": "h", "minute": "min", "second": "s", "mile": "mi", "yard": "yd"}
QUOTED = re.compile(r"\\(?:text[a-z]*|mathrm|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
TOKEN = re.compile(r'("?)([A-Za-z]+)'
                   r"|(\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?|<=|>=|!=|==|\*\*|\S)", re.S)

def _tokens(text: str, first_reading: bool) -> list[str]:
    """Cut text into tokens of one spelling, without spacing and without braces around a single token."""
    text = QUOTED.sub(lambda match: re.sub("[A-Za-z]+", r' "\g<0>', match[1]), text)  # quotes mark words of \text{...}
    text = re.sub(r"\\mathbb\s*\{?R\}?", r"(-∞,∞)", text)
    text = re.sub(r"\\(begin|end)\s*\{[a-z]*(?:matrix|array)\}(?:\s*\{[^{}]*\})?", r"\\\1 ", text)
    text = re.sub(r"(?<=[0-9])\s*m(?=[²³])", ' "m', text)
    text = re.sub(r"(frac\s*[0-9])(?=[0-9])", r"\1 ", text)  # \frac12
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = re.sub(r"(?<=[0-9])(?:\s*\{\s*,\s*\}\s*|,?\\[!,])(?=[0-9]{3})", "", text)  # thousands: 1{,}234 and 1\,234
    if first_reading:
        thousands = "(?<![0-9.])[1-9][0-9]{0,2}(?:[, ][0-9]{3})+(?![0-9])"
        text = re.sub(thousands, lambda match: re.sub("[, ]", "", match[0]), text)
    else:
        text = re.sub("(?<=[0-9])(?=[eE][+-]?[0-9])", " ", text)
    tokens = ["", ""]
    for quote, letters, token in TOKEN.findall(text):
        unit = UNITS.get(letters) or UNITS.get(letters.lower().removesuffix("s"))
        if letters in FUNCTIONS:
            tokens.append("\\" + letters)
        elif letters and letters not in SPELLINGS:
            if len(letters) > 3 or quote and (unit or len(letters) > 1) or unit and len(letters) > 1:
                has_number = re.match("[0-9)}π]|unit", tokens[-1] if tokens[-1] != "/" else tokens[-2])
                tokens.append("unit " + (unit or letters) if has_number else letters)  # a unit, or a word of prose
            else:
                tokens += letters  # a variable each
        elif token == "}" and tokens[-2] == "{":
            del tokens[-2]
        elif token not in SKIPPED:
            tokens += SPELLINGS.get(letters or token, [token])
        if tokens[-2:] in (["^", "unit °"], [",", ","], [r"\\", r"\end"]):  # 90^\circ; 1, 2, and 3; an empty last row
            del tokens[-2]
    return tokens[2:] + ["\n"]

# --- Parser -----------------------------------------------------------------------------------------------------------
# A tree is a Fraction, a name or a tuple (kind, *arguments). Kinds of values are + * ^ and functions; others are list,
# set, union, matrix, relation, :: (a ratio of several terms) and the brackets () (] [) [] of tuples and intervals.
# Units and the sign ± are names among the factors of a product.

RELATIONS = tuple("=≈∈<>≤≥≠")
LEVELS = ((r"\\",), "&", ";", ",", RELATIONS, "∪", ":", "+-±∓", "*/")  # operators, the loosest first
TERM, FACTOR = 8, 9
SIGNS = {"+": (), "-": (Fraction(-1),), "±": ("±",), "∓": (Fraction(-1), "±")}
CLOSING = {"(": ")]", "[": "])", "{": "}", r"\{": (r"\}",), "|": "|", r"\begin": (r"\end",)}

def _kind(node) -> str:
    return node[0] if isinstance(node, tuple) else "value"

def _signed(sign: str, node):
    return ("*", *SIGNS[sign], node) if SIGNS[sign] else node

def _inverse(node):
    return ("^", node, Fraction(-1))

def _combine(operators: list[str], operands: list):
    """The tree of operands joined by operators of one level."""
    first, *others = operands
    if operators[0] == ";":  # `p=5, q=2; p=7, q=2` is a list of two pairs
        return ("list", *(("()", *group[1:]) if _kind(group) == "list" else group for group in operands))
    if set(operators) <= {">", "≥"}:  # turned round
        return ("relation", "".join("<≤"[sign == "≥"] for sign in operators[::-1]), *operands[::-1])
    if operators[0] in RELATIONS:
        return ("relation", "".join(operators), *operands)
    if operators[0] in SIGNS:
        return ("+", first, *map(_signed, operators, others))
    if operators[0] == ":" and len(others) > 1:
        return ("::", *(("*", node, _inverse(first)) for node in others))
    if operators[0] in "*/:":
        return ("*", first, *(node if sign == "*" else _inverse(node) for sign, node in zip(operators, others)))
    return ({",": "list", "∪": "union", "&": "row", r"\\": "matrix"}[operators[0]], *operands)

class _Parser:
    """Recursive descent through the levels of operators down to signed factors, powers and atoms."""

    def __init__(self, tokens: list[str], log_base):
        self.tokens, self.log_base, self.at, self.depth = tokens, log_base, 0, 0
        self.bar_closes = False  # inside |...| and {x | ...}

    def take(self, wanted) -> str:
        """Consume and return the next token if it is among those wanted, else return an empty string."""
        token = self.tokens[self.at]
        self.at += token in wanted
        return token if token in wanted else ""

    def level(self, level: int = 0):
        """Operands of the next level joined by this level's operators."""
        if level == FACTOR:
            return self.factor()
        operands, operators = [self.level(level + 1)], []
        while operator := self.take(LEVELS[level]) or level == TERM and self.juxtaposed() and "*":
            operators.append(operator)
            operands.append(self.level(level + 1))
        return _combine(operators, operands) if operators else operands[0]

    def juxtaposed(self) -> bool:
        """Whether a factor follows without an operator; a number does so only as in `x 3^x`, never as in `5 6`."""
        token, before = self.tokens[self.at], self.tokens[self.at - 1]
        if token[:1].isdigit():
            return self.tokens[self.at + 1] == "^" and not before.isdigit()
        if token in CLOSING:
            return token != "|" or not self.bar_closes
        return token[:1].isalpha() or token[:1] == "\\" and token not in (r"\}", r"\\", r"\end")

    def factor(self):
        """An atom with its sign, powers and factorials."""
        if sign := self.take("+-±∓"):
            return _signed(sign, self.factor())
        base = self.atom()
        while token := self.take("^!"):
            base = ("factorial", base) if token == "!" else ("^", base, self.argument())
        return base

    def argument(self):
        r"""What one token or group makes: an argument of \frac, \sqrt, ^; a number in it is never a mixed number."""
        if self.take("-"):
            return _signed("-", self.argument())
        return Fraction(self.raw()) if self.tokens[self.at][:1].isdigit() else self.atom()

    def raw(self) -> str:
        """One token or group as text."""
        start, depth = self.at, 0
        while self.at == start or depth > 0:
            depth += {"{": 1, "}": -1}.get(self.tokens[self.at], 0)
            self.at += 1
        return " ".join(self.tokens[start:self.at])

    def atom(self):
        token, after = self.tokens[self.at], self.tokens[self.at + 1:self.at + 4]
        if token[:1].isdigit():
            parts = after[1:] if after[0] == r"\frac" else after[::2] if after[1:2] == ["/"] else []
            if token.isdigit() and len(parts) == 2 and all(map(str.isdigit, parts)) and int(parts[0]) < int(parts[1]):
                self.at += 4  # a mixed number
                return int(token) + Fraction(int(parts[0]), int(parts[1]))
        self.at += 1
        if token[:1].isdigit():
            return Fraction(int(token, int(self.raw())) if self.take("_") else token)
        if token in CLOSING:
            return self.group(token)
        if token == r"\frac":
            return ("*", self.argument(), _inverse(self.argument()))
        if token == r"\sqrt":
            index = self.group("[") if self.take("[") else Fraction(2)
            return ("^", self.argument(), _inverse(index))
        if token == r"\binom":
            return ("binomial", self.argument(), self.argument())
        if token[1:] in FUNCTIONS:
            return self.function(FUNCTIONS[token[1:]])
        if token not in SYMBOLS and not token[:1].isalpha():
            raise ValueError(f"unexpected {token!r}")
        return token + "_" + self.raw() if self.take("_") else token

    def function(self, name: str):
        r"""A function with its power and base: \sin^2 x, \sin^{-1} x, \log_2(x), \cos 2\pi t."""
        power = self.argument() if self.take("^") else Fraction(1)
        base = self.argument() if self.take("_") else {"log": self.log_base, "lg": Fraction(10)}.get(name, "e")
        if opening := self.take(("(", "[", "{")):
            argument = self.group(opening)
        else:  # the factors up to the next function, bracket or unit
            argument = self.factor()
            while self.juxtaposed() and not (self.tokens[self.at][1:] in FUNCTIONS or self.tokens[self.at] in CLOSING):
                argument = ("*", argument, self.factor())
        if power == _signed("-", Fraction(1)) and name in INVERSES:
            return (INVERSES[name], argument)
        if name in ("log", "ln", "lg"):
            return ("^", ("log", argument, base), power)
        return ("^", (RECIPROCALS.get(name, name), argument), _signed("-", power) if name in RECIPROCALS else power)

    def group(self, opening: str):
        """What brackets hold: one value, a tuple or an interval, a set, an absolute value."""
        self.depth += 1
        outer, self.bar_closes = self.bar_closes, opening in ("|", r"\{")
        closing = self.take(CLOSING[opening])
        content = ("list",) if closing else self.level()
        if opening == r"\{" and self.take("|:"):  # {x | condition} says what the condition says
            content = self.level()
        closing = closing or self.take(CLOSING[opening])
        if not closing or self.depth > MAX_DEPTH:
            raise ValueError("brackets unclosed or too deep")
        self.depth, self.bar_closes = self.depth - 1, outer
        items = content[1:] if _kind(content) == "list" else (content,)
        if opening == r"\begin":
            rows = content[1:] if _kind(content) == "matrix" else (content,)
            return ("matrix", *(row if _kind(row) == "row" else ("row", row) for row in rows))
        if opening == "|":
            return ("abs", content)
        if opening == r"\{" or opening == "{" and len(items) > 1:
            return ("set", *items)
        return content if len(items) == 1 and closing == CLOSING[opening][0] else (opening + closing, *items)

# --- Values -----------------------------------------------------------------------------------------------------------
# A scope says what names and kinds mean. Numbers stay fractions until a root, a function or a name makes them floats.

def _bounded(number):
    if isinstance(number, Fraction) and max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        raise ValueError("number too large")
    return number

def _power(base, exponent, number=lambda value: value):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > MAX_BITS and abs(base) != 1:
            raise ValueError("power too large")
        return base ** int(exponent)
    if isinstance(base, (Fraction, float)) and base < 0 and isinstance(exponent, Fraction) and exponent.denominator % 2:
        return (-1) ** exponent.numerator * _power(-base, exponent, number)  # the odd root is meant to be the real one
    value = number(base) ** exponent
    if base and not value:
        raise ValueError("too small for a float")
    return value

def _factorial(number):
    if not isinstance(number, Fraction):
        return math.gamma(number + 1)
    if number.denominator > 1 or number > 1000:
        raise ValueError("not an integer, or too large")
    return Fraction(math.factorial(int(number)))

# A matrix has the value of a fixed sum of its cells, so that sums and multiples of matrices are compared as values.
SUMS = {"binomial": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n - k)), "abs": abs,
        "+": lambda *terms: reduce(lambda a, b: _bounded(a + b), terms),
        "*": lambda *factors: reduce(lambda a, b: _bounded(a * b), factors),
        "row": lambda *cells: sum(cell * 7**i for i, cell in enumerate(cells)),
        "matrix": lambda *rows: sum(row * 11**i for i, row in enumerate(rows))}
REAL = {**vars(math), **SUMS, "^": _power, "factorial": _factorial, "π": math.pi}
COMPLEX = {**REAL, **vars(cmath), "i": 1j}
RANGES = ((0.2, 0.9), (0.2, 0.9), (1.1, 2.9), (1.1, 2.9), (-0.9, -0.2), (-3, 3), (-3, 3))  # of the random points
UNDEFINED = (ArithmeticError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)

def _names(node) -> set[str]:
    if isinstance(node, tuple):
        return set().union(*map(_names, node[1:]))
    return {node} if isinstance(node, str) else set()

def _replace(node, values: dict):
    """The tree with names replaced."""
    if isinstance(node, tuple):
        return (node[0], *(_replace(part, values) for part in node[1:]))
    return values.get(node, node) if isinstance(node, str) else node

def _evaluate(node, scope: dict):
    """The value of a tree in a scope; raises one of UNDEFINED where there is none."""
    if isinstance(node, tuple):
        return scope[node[0]](*[_evaluate(part, scope) for part in node[1:]])
    return scope[node] if isinstance(node, str) else node

def _samples(trees, scope: dict) -> list:
    """Values of the trees at those random points where all of them are defined."""
    names = sorted(set().union(*map(_names, trees)) - {"e", "π", "i"})
    generator, samples = random.Random(len(names)), []
    for low, high in RANGES if names else RANGES[:1]:
        point = scope | {name: generator.uniform(low, high) for name in names}
        try:
            samples.append([_evaluate(tree, point) for tree in trees])
        except UNDEFINED:
            pass
    numbers = (Fraction, int, float, complex) if scope is COMPLEX else (Fraction, int, float)
    return [values for values in samples if all(isinstance(x, numbers) and abs(x) < math.inf for x in values)]

def _same_value(left, right) -> bool:
    if "∞" in _names(left) | _names(right):
        return left == right
    samples = _samples((left, right), REAL) or _samples((left, right), COMPLEX)
    exact = [value for sample in samples[:1] for value in sample if isinstance(value, Fraction)]
    printed = any(value.denominator > 10**12 and 10**20 % value.denominator == 0 for value in exact)
    if len(exact) == 2 and not printed:
        return exact[0] == exact[1]
    gaps = [abs(a - b) / max(abs(a), abs(b)) if a != b else 0 for a, b in samples]
    if not samples or any(gap > 1e-6 and abs(a - b) > 1e-9 for gap, (a, b) in zip(gaps, samples)):
        return False
    if max(gaps) < 1e-12 and (printed or len(gaps) > 1):  # a decimal of more than 12 places is a float printed in full
        return True
    return _same_symbolically(left, right)

def _same_symbolically(left, right) -> bool:
    """Sympy's word on values whose floats agree, which bounds the size of all numbers in them."""
    import sympy
    number = sympy.Integer(1).__mul__  # of fractions
    scope = {**vars(sympy), **SUMS, "^": lambda base, exponent: _power(base, exponent, number)}
    scope |= {name: sympy.Symbol(name, positive=True) for name in _names(left) | _names(right)}
    scope |= {"e": sympy.E, "π": sympy.pi, "i": sympy.I}
    try:
        difference = number(_evaluate(left, scope)) - _evaluate(right, scope)
        if not difference.free_symbols:
            return abs(sympy.N(difference, 30)) < 1e-60
        return difference.count_ops() < 60 and sympy.simplify(difference) == 0
    except Exception:  # sympy raises many kinds
        return False

# --- Comparison by kind -----------------------------------------------------------------------------------------------

CONTAINERS = {"list", "set", "union", "matrix", "row", "::", "()", "(]", "[)", "[]"}
SCALES = {"unit %": Fraction(1, 100), "unit °": ("*", "π", Fraction(1, 180))}

def _items(node) -> list:
    """The elements of a list, set or union, or the one other tree; one with ± counts as two."""
    parts = node[1:] if _kind(node) in ("list", "set", "union") else [node]
    return [_replace(part, {"±": Fraction(sign)}) for part in parts for sign in (1, -1)[:1 + ("±" in _names(part))]]

def _same_items(left, right) -> bool:
    """Equality of sets: each item of either has its equal in the other."""
    pairs = ((left, right), (right, left)) if max(len(left), len(right)) <= MAX_ITEMS else ()
    return bool(pairs) and all(any(_equal(a, b) for b in others) for items, others in pairs for a in items)

def _equal(left, right) -> bool:
    left, right = _items(left), _items(right)
    if len(left) != 1 or len(right) != 1:
        return left == right or min(len(left), len(right)) > 1 and _same_items(left, right)
    (left,), (right,) = left, right
    kinds = {_kind(left), _kind(right)}
    if left == right or "relation" in kinds:
        return left == right or _equal_relations(left, right)
    if kinds == {"matrix", "()"}:  # a row or a column is a vector
        matrix, vector = (left, right) if left[0] == "matrix" else (right, left)
        cells = [cell for row in matrix[1:] for cell in row[1:]]
        return len(cells) in (len(matrix) - 1, len(matrix[1]) - 1) and _equal(("()", *cells), vector)
    if len(kinds) == 1 and kinds <= CONTAINERS:
        return len(left) == len(right) and all(map(_equal, left[1:], right[1:]))
    return not kinds & CONTAINERS - {"matrix"} and _equal_quantities(left, right)

def _equal_quantities(left, right) -> bool:
    """Equality of values. One side may leave out a unit, degree or percent sign; the other's then counts as one."""
    if _same_value(_replace(left, SCALES), _replace(right, SCALES)):
        return True
    names = [_names(node) if isinstance(node, tuple) else () for node in (left, right)]
    units = [{name: Fraction(1) for name in side if name.startswith("unit ")} for side in names]
    return bool(units[0]) != bool(units[1]) and _same_value(_replace(left, units[0]), _replace(right, units[1]))

def _designates(node) -> bool:
    """Whether a side of an equation only names what the other side is: x, f(x), AB, |AB|, A:B, (p, q)."""
    if _kind(node) == "^":
        return node[2] == -1 and _designates(node[1])
    return node not in ("e", "π", "i", "∞") if isinstance(node, str) else (
        _kind(node) in ("*", "abs", "()") and all(map(_designates, node[1:])))

def _solution(node):
    """What a relation names and says of that: x and 5 for `x = 5`, x and an interval for `x > 5`; else Nones."""
    if _kind(node) != "relation":
        return None, node
    _, signs, *sides = node
    first, last = _designates(sides[0]), _designates(sides[-1])
    if set(signs) <= set("=≈∈"):
        subject = sides.pop(0 if first else -1) if first or last else None
        return (subject, sides[0]) if all(_equal(sides[0], side) for side in sides[1:]) else (None, None)
    if len(sides) == 2 and (first or last):
        signs, sides = ("<" + signs, [_signed("-", "∞"), *sides]) if first else (signs + "<", [*sides, "∞"])
    if len(sides) != 3 or not set(signs) <= set("<≤"):
        return None, None
    return sides[1], ("(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"], sides[0], sides[2])

def _equal_relations(left, right) -> bool:
    (subject, value), (other_subject, other) = _solution(left), _solution(right)
    if None not in (value, other) and (subject == other_subject or None in (subject, other_subject)):
        return _equal(value, other)
    if _kind(left) != _kind(right) or left[1] != right[1] or len(left) != 4:
        return False
    samples = _samples([("+", side[2], _signed("-", side[3])) for side in (left, right)], REAL)
    ratios = [a / b for a, b in samples if a and b]  # of left sides minus right sides
    constant = len(ratios) > 1 and max(abs(ratio - ratios[0]) for ratio in ratios) < 1e-9 * abs(ratios[0])
    return constant and (left[1] not in "<≤" or ratios[0] > 0)

# Ambiguous answers have two readings. First 1,234 and 2e3 are one number each and \log is decimal; then they are a list
# and a product with Euler's number, and \log is natural. Prediction and gold are always read in the same way.
AMBIGUOUS = re.compile(r"[0-9][,eE ]|log")

def math_equal(prediction: str, gold: str) -> bool:
    """Whether an answer equals the reference answer. Never raises, never evaluates text as code, in bounded time."""
    prediction, gold = prediction.strip(), gold.strip()
    if prediction == gold or max(len(prediction), len(gold)) > MAX_LENGTH:
        return prediction == gold != ""
    for first_reading in (True, False) if AMBIGUOUS.search(prediction + " " + gold) else (True,):
        sides = _tokens(prediction, first_reading), _tokens(gold, first_reading)
        words = ["".join(tokens[:-1]).replace("unit ", "").lower() for tokens in sides]
        if sides[0] == sides[1] != ["\n"] or words[0] == words[1] and words[0].isalpha() and len(words[0]) > 1:
            return True
        if all(word.isascii() and word.isalpha() and len(word) > 3 for word in words):
            return False  # words are no products of letters
        parsers = [_Parser(tokens, Fraction(10) if first_reading else "e") for tokens in sides]
        try:
            trees = [parser.level() for parser in parsers]
            if all(parser.take("\n") for parser in parsers) and _equal(*trees):
                return True
        except UNDEFINED:
            pass
    return False

# ----------------------------------------------------------------------------------------------------------------------
# Code, inside the sandbox, where the source text of these five functions is sent. `drive` forks a child a test; the
# outputs expected never come here. In bubblewrap it is process 1, which no signal from a program can hurt.

def kill_all():
    """Kill all that tests have started, and see it gone. Whatever its parents leave becomes a child of this process."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        for pid in children:
            try:  # many at once, to outrun a fork bomb: with process 1 all there are, else a session
                os.kill(-1 if os.getpid() == 1 else -pid, signal.SIGKILL)
            except ProcessLookupError:  # it heads no session
                os.kill(pid, signal.SIGKILL)
        if not children:
            return
        os.wait()

def over_limits(setup):
    """Do the processes of a test hold too much together? The kernel's limits are on each of them."""
    pages, disk = 0, os.statvfs(setup["folder"])
    for pid in filter(str.isdigit, os.listdir("/proc")) if os.getpid() == 1 else []:
        try:
            with open(f"/proc/{pid}/statm") as file:
                pages += int(file.read().split()[1])
        except OSError:  # it has ended
            continue
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    full = used > setup["disk"] or disk.f_files - disk.f_ffree > setup["inodes"]
    return os.getpid() == 1 and (full or pages * resource.getpagesize() > setup["memory"])

def become_program(setup, test, stdin, answer):
    """In the forked child: take on the limits and run the program. Never returns."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    null = os.open(os.devnull, os.O_RDWR)
    for fd, file in enumerate((stdin, answer, null, null) if test["kind"] == "stdin" else (stdin, null, null, answer)):
        os.dup2(file, fd)
    os.closerange(4, 64)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
    for name, limit in setup["rlimits"].items():
        kind, hard = getattr(resource, "RLIMIT_" + name), resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, hard if name == "STACK" else limit))  # deep recursion may ask for more stack
    if setup["uid"]:
        os.setgroups([])
        os.setresgid(setup["uid"], setup["uid"], setup["uid"])
        os.setresuid(setup["uid"], setup["uid"], setup["uid"])
    sys.argv, module = ["solution.py"], type(sys)("__main__" if test["kind"] == "stdin" else "solution")
    sys.modules[module.__name__], names = module, vars(module)  # dataclasses and pickle look there
    exec(compile(setup["source"], "solution.py", "exec"), names)
    if test["kind"] == "stdin":
        sys.exit()  # the usual end of a program: threads joined, exit handlers called, output flushed
    own = vars(names.get("Solution", module)).items()
    name = test["name"] or next((n for n, v in own if getattr(v, "__module__", "") == "solution" and n[0] != "_"), "")
    function = getattr(names["Solution"](), name) if hasattr(names.get("Solution"), name) else names.get(name)
    if test["kind"] == "function":
        text = json.dumps(function(*test["given"]))
    else:
        script, text = test["given"]
        names["candidate"] = function
        exec(compile(script, "asserts.py", "exec"), names)
        if "def check(" in script and "\ncheck(" not in script:
            names["check"](function)
    with open(3, "w") as file:
        file.write(text)
    os._exit(0)

def run_test(setup, test):
    """Run a test in a forked child, then kill whatever it started. No output: it failed. Clean: it left no files."""
    stdin, answer = (open(os.path.join(setup["folder"], name), "w+b", buffering=0) for name in ("stdin", "answer"))
    for file in (stdin, answer):  # from now on they have no name, and end with this test
        os.unlink(file.name)
    stdin.write(test["given"].encode(errors="replace") if test["kind"] == "stdin" else b"")
    stdin.seek(0)
    deadline, status, child = time.monotonic() + test["seconds"], None, os.fork()
    if not child:
        become_program(setup, test, stdin.fileno(), answer.fileno())
    while status is None and time.monotonic() < deadline:
        signal.sigtimedwait([signal.SIGCHLD], 0.03)
        pid, ended = os.waitpid(child, os.WNOHANG)
        status = ended if pid else None
        if not pid and over_limits(setup):
            break
    kill_all()
    answer.seek(0)
    output = answer.read().decode(errors="replace") if status == 0 else None
    return {"output": output, "clean": os.listdir(setup["folder"]) == setup["files"]}

def drive():
    """Read the set-up, then tests, a line each; answer each test with a line."""
    commands, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    setup = json.loads(commands.readline())
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGINT])
    os.umask(0)
    os.chmod(setup["folder"], 0o777)
    os.chdir(setup["folder"])
    setup["files"] = os.listdir(setup["folder"])
    with open("/proc/self/oom_score_adj", "w") as file:  # where memory runs out, it is not the trainer that goes
        file.write("1000")
    libc = ctypes.CDLL(None)
    libc.prctl(4, 0)  # PR_SET_DUMPABLE: programs cannot open this process's memory or files
    if os.getpid() != 1:  # without bubblewrap: inherit what programs leave behind, take it along when the worker ends
        libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        signal.signal(signal.SIGTERM, lambda *_: os._exit(kill_all() or 1))
    sys.path += setup["path"]
    builtins.exit = builtins.quit = sys.exit  # as the site module would
    for module in map(__import__, setup["implied"]):
        for name, value in {module.__name__: module, **vars(module)}.items():
            if name[0] != "_":
                vars(builtins).setdefault(name, value)
    gc.freeze()  # forked children need not visit what is here: that halves their costs
    for line in commands:
        print(json.dumps(run_test(setup, json.loads(line))), file=replies, flush=True)

# ----------------------------------------------------------------------------------------------------------------------
# Code, outside the sandbox.

IMPLIED = "typing collections heapq bisect itertools functools math string re operator random copy datetime".split()
LIMITS = {"memory": 1 << 30, "disk": 64 << 20, "inodes": 4096}  # of all processes of a test together
RLIMITS = {"AS": 2 << 30, "STACK": 120 << 20, "FSIZE": 16 << 20, "NOFILE": 64, "NPROC": 64, "CORE": 0}
GRACE, START = 5, 60  # seconds: how late a limit of ours may strike, how long a process may take to start
REAL_NUMBER = re.compile(r"[+-]?(?=.*[.e])(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.A | re.I)
DENIED = {  # machine: its number for seccomp, that of clone, and of: unshare setns socket ptrace process_vm_readv
    # process_vm_writev memfd_create shmget semget msgget mq_open add_key request_key keyctl bpf perf_event_open
    # userfaultfd
    "x86_64": (0xC000003E, 56, [272, 308, 41, 101, 310, 311, 319, 29, 64, 68, 240, 248, 249, 250, 321, 298, 323]),
    "aarch64": (0xC00000B7, 220, [97, 268, 198, 117, 270, 271, 279, 194, 190, 186, 180, 217, 218, 219, 280, 241, 282])}

def seccomp_filter():
    """What the kernel denies programs, as BPF: namespaces, sockets, others' memory, memory that no limit counts."""
    machine, clone, calls = DENIED[platform.machine()]
    allow, deny, unknown, kill = ((0x06, 0, 0, action) for action in (0x7FFF0000, 0x50001, 0x50026, 0x80000000))
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, machine), kill, (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), deny]
    for number in [*calls, 425, 447]:  # and io_uring_setup and memfd_secret, alike on all machines
        code += [(0x15, 0, 1, number), deny]
    code += [(0x15, 0, 1, 435), unknown]  # clone3 hides its flags; where it is unknown, the C library takes clone
    code += [(0x15, 0, 3, clone), (0x20, 0, 0, 16), (0x45, 0, 1, 0x7E020000), deny, allow]  # CLONE_NEW...
    return b"".join(struct.pack("HBBI", *line) for line in code)

def packages():
    """The folders of installed packages, which programs may import."""
    return [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]

@functools.cache
def driver():
    """The text of the program that runs inside."""
    functions = map(inspect.getsource, (kill_all, over_limits, become_program, run_test, drive))
    return "\n".join(["import builtins, ctypes, gc, json, os, resource, signal, sys, time", *functions, "drive()"])

@functools.cache
def bubblewrap():
    """bwrap and its options: new namespaces, no capabilities, and nothing to read but Python and the C library."""
    command = [shutil.which("bwrap") or "bwrap", *"--die-with-parent --as-pid-1 --new-session --cap-drop ALL".split(),
               *"--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try".split()]
    if os.geteuid():
        command += ["--unshare-user"]
    else:  # the driver gives programs another user id, and must still be able to kill them
        command += "--cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_KILL".split()
    if b"--size" in subprocess.run([command[0], "--help"], capture_output=True).stdout:
        command += ["--size", str(LIMITS["disk"])]
    command += ["--tmpfs", "/tmp", "--dir", "/dev", "--symlink", "/tmp", "/dev/shm", "--proc", "/proc"]
    for link, target in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        command += ["--symlink", "/proc/self/fd" + target, "/dev/" + link]
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, *packages()):
        for folder in reversed(Path(path).parents[:-1]):  # else bwrap closes them to other users
            command += ["--dir", str(folder)]
        command += ["--ro-bind-try", path, path]
    return [*command, "--remount-ro", "/"]

class Peer:
    """A process that we start, talk to in lines of JSON, and kill. An end, a late or a senseless answer raises."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        self.unread, self.poll = b"", select.poll()
        self.poll.register(self.process.stdout, select.POLLIN)

    def send(self, message):
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self, seconds):
        deadline, line, chunk = time.monotonic() + seconds, bytearray(), self.unread
        while b"\n" not in chunk:
            line += chunk
            if len(line) > 7 * RLIMITS["FSIZE"] or not self.poll.poll(1000 * max(0, deadline - time.monotonic())):
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
        end, self.unread = chunk.split(b"\n", 1)
        return json.loads(line + end)

    def kill(self):
        """Kill the process, and its group if it leads one."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()

@contextlib.contextmanager
def sandbox(source, kind, mode, timeout):
    """The driver for tests of one program, as a Peer: in bubblewrap, or as a plain process if mode is "limits"."""
    command = [os.path.realpath(sys._base_executable), "-I", "-S", "-X", "utf8", "-c", driver()]
    rlimits, readable = RLIMITS | {"CPU": math.ceil(timeout) + 1}, True
    private = tempfile.TemporaryDirectory() if mode == "limits" else contextlib.nullcontext("/tmp")
    with private as folder, open(os.memfd_create("seccomp"), "w+b") as file:
        if mode == "limits":
            readable = all(path.stat().st_mode & 1 for path in Path(os.__file__).parents)
            with open("/proc/loadavg") as load:  # without a namespace, NPROC counts all that this user runs
                rlimits["NPROC"] += int(load.read().split()[3].split("/")[1])
        else:
            file.write(seccomp_filter())
            file.seek(0)
            command = [*bubblewrap(), "--seccomp", str(file.fileno()), *command]
        environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
        box = Peer(command, env=environment, stderr=subprocess.PIPE, pass_fds=[file.fileno()],
                   start_new_session=mode == "limits")  # then the driver outlives a kill of the worker, to clean up
        # NPROC passes root by: then programs get an id out of the range for throw-away users.
        uid = 61184 + os.getpid() % 4336 if os.geteuid() == 0 and readable else None
        try:
            box.send({**LIMITS, "source": source, "implied": [] if kind == "stdin" else IMPLIED, "folder": folder,
                      "uid": uid, "path": packages(), "rlimits": rlimits})
            yield box
        finally:
            box.kill()

@functools.cache
def refusal() -> str:
    """Why programs cannot be run in bubblewrap here, found out by running one; empty if they can."""
    try:
        with sandbox("print(6 * 7)", "stdin", "bwrap", 5) as box:
            box.send({"kind": "stdin", "given": "", "seconds": 5})
            with contextlib.suppress(EOFError, ValueError):
                if box.receive(START)["output"] == "42\n":
                    return ""
        reason = " ".join(box.process.stderr.read().decode(errors="replace").split())
    except (OSError, KeyError) as error:
        reason = repr(error)
    return f"code cannot be scored: install bubblewrap so that it runs here ({reason}), or choose sandbox 'limits'"

def extract_code(response):
    """The last python block of a response, which may lack its end; None where there is none."""
    fence = r"```(?:python|py)3?\b[^\n]*\n(.*?)(?:^[ \t]*```|```[ \t\r]*$|\Z)"
    blocks = re.findall(fence, response, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    return textwrap.dedent(blocks[-1].replace("\r\n", "\n")) if blocks else None

def read_tests(reference):
    """The tests of a reference, each as what the sandbox is sent and what must come back. Raises if malformed."""
    reference = json.loads(reference) if isinstance(reference, str) else reference
    name, tests = reference.get("fn_name"), []
    if "asserts" in reference:
        token = os.urandom(16).hex()  # what is written when the script has come to its end
        return [({"kind": "asserts", "name": name, "given": [reference["asserts"], token]}, token)]
    for given, expected in zip(reference["inputs"], reference["outputs"], strict=True):
        if not name:
            given, expected = ("\n".join(map(str, v)) if isinstance(v, list) else str(v) for v in (given, expected))
        elif isinstance(given, str):  # the paper's data: a JSON value a line
            given = [json.loads(line) for line in given.split("\n") if line.strip()]
            expected = json.loads(expected) if isinstance(expected, str) else expected
        tests.append(({"kind": "function" if name else "stdin", "name": name, "given": given}, expected))
    return tests

def near(actual, expected):
    """Floats equal within 1e-6, absolute or relative."""
    return abs(actual - expected) <= 1e-6 * max(1.0, abs(expected)) < math.inf

def same_token(actual, expected):
    """Equal as texts, or numbers near each other that both have a point or an exponent."""
    real = actual != expected and REAL_NUMBER.fullmatch(actual) and REAL_NUMBER.fullmatch(expected)
    return near(float(actual), float(expected)) if real else actual == expected

def same_value(actual, expected):
    """Equal as JSON: True is not 1, a list has its length and order, two floats may be near each other."""
    if isinstance(actual, list) and isinstance(expected, list):
        return len(actual) == len(expected) and all(map(same_value, actual, expected))
    if isinstance(actual, dict) and isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same_value(actual[key], expected[key]) for key in actual)
    if isinstance(actual, float) and isinstance(expected, float):
        return near(actual, expected)
    return actual == expected and isinstance(actual, bool) == isinstance(expected, bool)

def passes(output, kind, expected):
    """Is the output of a test right? Text is compared token by token, as contest judges do."""
    if kind == "function":
        return same_value(json.loads(output), expected)
    actual, expected = output.split(), expected.split()
    return len(actual) == len(expected) and all(map(same_token, actual, expected))

def score_code(response, reference, mode, timeout, total_timeout, max_tests):
    """The share of tests passed (Sec. 4). A sandbox in which a test left a trace is not used for the next."""
    source, tests = extract_code(response), read_tests(reference)[:max_tests]
    passed, left, deadline = 0, tests if source else [], time.monotonic() + total_timeout
    while left and time.monotonic() < deadline:
        with sandbox(source, left[0][0]["kind"], mode, timeout) as box, contextlib.suppress(Exception):
            clean = True
            while clean is True and left:  # what comes from inside may be anything, and fail a decoder in any way
                (test, expected), *left = left
                seconds = max(0, min(timeout, deadline - time.monotonic()))
                box.send({**test, "seconds": seconds})
                reply = box.receive(seconds + START)
                clean = reply["clean"]
                passed += reply["output"] is not None and passes(reply["output"], test["kind"], expected)
    return passed / len(tests) if tests else 0.0

# ----------------------------------------------------------------------------------------------------------------------
# The pool, and the command line.

def score_math(response, reference):
    """1.0 if there is an answer and it equals the reference, else 0.0."""
    answer = extract_answer(response) if isinstance(response, str) else None
    return float(answer is not None and isinstance(reference, str) and math_equal(answer, reference))

def score(response: str, task: str, reference) -> float:
    """The outcome reward of one response, in [0, 1]. RuntimeError if it is code and cannot be run here."""
    if task == "math":
        return score_math(response, reference)
    with Verifier(workers=1) as verifier:
        return verifier.submit(response, task, reference).result()

def work():
    """A worker: reads items, answers each with two lines: that it begins, and the score."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the trainer, however that ends
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    sys.path += sys.argv[2:]  # -I leaves out what users install for themselves
    for line in sys.stdin:
        response, task, reference, limits = json.loads(line)
        if task == "math":
            import sympy  # noqa: F401  this takes seconds, which are not the answer's
        print("true", flush=True)
        try:
            value = score_math(response, reference) if task == "math" else score_code(response, reference, *limits)
        except Exception:  # a malformed reference, an answer beyond all bounds
            value = 0.0
        print(value, flush=True)

class Verifier:
    """Scores responses in worker processes, which are killed and replaced when they take too long. Context manager.

    workers: None for this rank's share of the cores. timeout, total_timeout: seconds a test or answer, a response.
    sandbox: "auto", "bwrap": programs run in bubblewrap or not at all; "limits": process and resource limits alone.
    max_tests: score programs by their first tests only.
    """

    def __init__(self, workers=None, timeout=6.0, total_timeout=60.0, sandbox="auto", max_tests=None):
        assert sandbox in ("auto", "bwrap", "limits"), sandbox
        workers = workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.limits, self.closed, self.lock = (sandbox, timeout, total_timeout, max_tests), False, threading.Lock()
        self.workers = [self._start() for _ in range(workers)]
        self.idle = queue.SimpleQueue()  # of places in self.workers
        for place in range(workers):
            self.idle.put(place)
        self.pool = ThreadPoolExecutor(workers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Stops at once: what has no score by now gets 0.0."""
        with self.lock:
            self.closed = True
        for worker in self.workers:
            worker.kill()
        self.pool.shutdown()

    def submit(self, response, task, reference) -> Future:
        """The future of a score. RuntimeError, with one line for the user, if it is code and cannot be run here."""
        if task == "code" and self.limits[0] != "limits" and refusal():
            raise RuntimeError(refusal())
        return self.pool.submit(self._score, response, task, reference)

    def score_batch(self, items) -> list[float]:
        """The scores of (response, task, reference) triples, in order. Never raises: what cannot be scored gets 0.0."""
        if self.limits[0] != "limits" and any(task == "code" for _, task, _ in items) and refusal():
            print(f"verify.py: {refusal()}", file=sys.stderr)
        return [future.result() for future in [self.pool.submit(self._score, *item) for item in items]]

    def _start(self):
        command = [sys.executable, "-I", os.path.abspath(__file__), "--worker", *filter(None, sys.path)]
        return Peer(command, start_new_session=True)

    def _score(self, *item):
        """In a thread of the pool: have a worker score an item."""
        place, (_, timeout, total_timeout, _) = self.idle.get(), self.limits
        try:
            seconds = {"math": timeout, "code": total_timeout + GRACE}[item[1]]
            with self.lock:  # whoever closes knows all workers
                if not self.closed and self.workers[place].process.poll() is not None:
                    self.workers[place] = self._start()
            self.workers[place].send([*item, self.limits])
            self.workers[place].receive(START)
            return float(self.workers[place].receive(seconds))
        except Exception:  # a malformed item, or no answer
            self.workers[place].kill()
            return 0.0
        finally:
            self.idle.put(place)

def main() -> int:
    """The command line, as at the top of this file."""
    if sys.argv[1:2] == ["--worker"]:
        return work()
    parser = argparse.ArgumentParser(description="Score responses, or compare two answers.")
    parser.error = fail = lambda message: sys.exit(print(f"verify.py: error: {message}", file=sys.stderr) or 2)
    parser.add_argument("file", nargs="?", help="lines of JSON with response, task (math or code) and reference")
    parser.add_argument("--output", help="where the scores go (default: FILE, ending in .scores.jsonl)")
    parser.add_argument("--workers", type=int, help="processes (default: as many as cores)")
    parser.add_argument("--timeout", type=float, default=6.0, help="seconds a test or an answer")
    parser.add_argument("--sandbox", choices=["auto", "bwrap", "limits"], default="auto", help="what programs run in")
    parser.add_argument("--answer", help="compare this answer")
    parser.add_argument("--gold", help="with this one")
    args = parser.parse_args()
    if (args.answer is None) != (args.gold is None) or (args.file is None) == (args.answer is None):
        fail("give a file, or --answer and --gold")
    if args.answer is not None:
        equal = math_equal(args.answer, args.gold)
        print(equal)
        return 0 if equal else 1
    if args.timeout <= 0 or (args.workers or 1) <= 0:
        fail("--timeout and --workers must be positive")
    output = args.output or os.path.splitext(args.file)[0] + ".scores.jsonl"
    if os.path.exists(output):
        fail(f"{output} exists: name another --output")
    from tqdm import tqdm
    futures = []
    try:
        lines = Path(args.file).read_text(errors="replace").removesuffix("\n").split("\n")
        with Verifier(args.workers, args.timeout, sandbox=args.sandbox) as verifier:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    {"math", "code"}.remove(row["task"])
                    futures.append(verifier.submit(row["response"], row["task"], row["reference"]))
                except (ValueError, TypeError, KeyError, RecursionError):
                    print(f"line {number}: not JSON with response, task (math or code), reference", file=sys.stderr)
                    futures.append(None)
            scores = [future and future.result() for future in tqdm(futures)]
        with open(output, "x") as file:
            file.writelines(json.dumps({"score": value}) + "\n" for value in scores)
    except (OSError, RuntimeError) as error:
        fail(error)
    scored = [value for value in scores if value is not None]
    print(f"mean {sum(scored) / max(1, len(scored)):.4f} of {len(scored)} responses; scores in {output}")
    return 0

if __name__ == "__main__":
    sys.exit(main())

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
import inspect
import json
import math
import os
import platform
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
from pathlib import Path

# ----------------------------------------------------------------------------------------------------------------------
# Math. Text never becomes code: an answer is cut into tokens and a recursive-descent parser makes a tree of them. Two
# trees are compared by kind: lists, tuples, intervals, matrices, relations, values. Values are exact as long as they
# are rational, else floats at random points; sympy has the last word on constants and wherever floats agree only nearly.

MAX_LENGTH = 3000  # characters of an answer that is parsed; longer ones are compared as text
MAX_DEPTH = 40  # nested groups
MAX_BITS = 10_000  # of a numerator or denominator: 3,000 digits
MAX_ITEMS = 50  # elements of a list or set, cells of a product of matrices

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
    "=": "==", "≈": r"\approx", "∈": r"\in", "*": r"\cdot \times \ast · × ⋅", "/": r"\div ÷", "^": "**",
    "+": "plus", "-": "− – minus", "∓": r"\mp", "^ 2": "²", "^ 3": "³", "∞": r"\infty oo inf infinity", "∪": r"\cup",
    "unit °": r"° \circ \degree degrees degree", "unit %": r"% \% percent percentage pct", "unit dollar *": r"\$",
    r"\{": r"\lbrace", r"\}": r"\rbrace", r"\{ \}": r"\emptyset \varnothing ∅", "(": r"⟨ \langle", ")": r"⟩ \rangle",
    "|": r"\mid \vert \lvert \rvert", ",": "or and", r"\overline": r"\bar", "…": r"\ldots \dots",
    "* 1000": "thousand", "* 1000000": "million", "* 1000000000": "billion",
    r"\frac 1 2": "½", r"\frac 1 3": "⅓", r"\frac 2 3": "⅔", r"\frac 1 4": "¼", r"\frac 3 4": "¾"}
SPELLINGS = {name: re.split("(?<!unit) ", tokens) for tokens, names in SPELLINGS.items() for name in names.split()}
SKIPPED = set(r". $ € £ ¥ ~ \, \; \: \! \( \) \[ \] \quad \qquad \left \right \big \Big \bigl \bigr \Bigl \Bigr "
              r"\limits \boxed \displaystyle \mathbf \mathit \mathcal \boldsymbol".split()) | {"\\ ", "\\\n"}
SYMBOLS = {"∞"} | {"\\" + name for name in (  # sums and accents count as factors
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi "
    "omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell angle triangle sum prod vec hat overline overrightarrow "
    "mathbb").split()}
INVERSES = {name: "a" + name for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
RECIPROCALS = {"sec": "cos", "csc": "sin", "cot": "tan"}
FUNCTIONS = {"\\" + name: name for name in [*INVERSES, *INVERSES.values(), *RECIPROCALS, "exp", "log", "ln", "lg"]}
FUNCTIONS |= {r"\arc" + name: inverse for name, inverse in INVERSES.items()}
SPELLINGS |= {name[1:]: [name] for name in FUNCTIONS}
UNITS = ("ft feet foot|in inch inche|m meter|cm centimeter|mm|km kilometer|mi mile|yd yard|g gram|kg kilogram|mg|"
         "lb pound|h hr hour|min minute|s sec second|day|mph|L liter|mL ml|N|J|kJ|eV|W|kW|V|K|Hz|Pa|kPa|atm|mol mole|"
         "people|yuan|cup|unit|per|square sq|cubic|th|dollar|cent")
UNITS = {name: names.split()[0] for names in UNITS.split("|") for name in names.split()}
REWRITES = (  # patterns and what takes their place, in this order
    (r"\\(?:text[a-z]*|mathrm|mathsf|mbox|operatorname)\s*\{([^{}]*)\}",  # quotes mark the words in it
     lambda match: re.sub("[A-Za-z]+", r' "\g<0>', match[1])),
    (r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|[|:])", r"\\{"),  # {x | condition}
    (r"\\mathbb\s*\{?R\}?", "(-∞,∞)"),
    (r"\\begin\s*\{vmatrix\}(.*?)\\end\s*\{vmatrix\}", r"|\\begin{matrix}\1\\end{matrix}|"),
    (r"\\(begin|end)\s*\{(?:[pbB]?(?:small)?matrix|array)\}(?:\s*\{[clr| ]*\})?", r"\\\1 "),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9])\s*m(?=[²³])", ' "m'),
    (r"\\\$(?!\s*[0-9.])", ""),  # before a number it stays: \$5 is no 5%
    (r"(?<![A-Za-z])([A-DF-Za-df-hj-z])\s*(?:\\left)?\(([0-9]+)(?:\\right)?\)", r"\1_{\2}"),  # f(0) is no product
    (r"(frac\s*[0-9])(?=[0-9])", r"\1 "),  # \frac12
    (r"(?<![0-9])\.(?=[0-9])", "0."),
    (r"([0-9]+)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}", lambda match:  # a repeating decimal
     f"({match[1]}.{match[2] or 0}+{match[3]}/{'9' * len(match[3])}{'0' * len(match[2])})"),
    (r"(?<=[0-9])(?:\s*\{\s*,\s*\}\s*|,?\\[!, ])(?=[0-9]{3})", ""))  # thousands: 1{,}234 and 1\,234
TOKEN = re.compile(r'("?)([A-Za-z]+)'
                   r"|(\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?|<=|>=|!=|==|\*\*|\S)", re.S)

def _tokens(text: str, first_reading: bool) -> list[str]:
    """Cut text into tokens of one spelling, without spacing and without braces around a single token."""
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    if first_reading:
        thousands = "(?<![0-9.])[1-9][0-9]{0,2}(?:[, ][0-9]{3})+(?![0-9])"
        text = re.sub(thousands, lambda match: re.sub("[, ]", "", match[0]), text)
    else:
        text = re.sub("(?<=[0-9])(?=[eE][+-]?[0-9])", " ", text)
    tokens = ["", ""]
    for quote, letters, token in TOKEN.findall(text):
        unit = UNITS.get(letters) or UNITS.get(letters.lower().removesuffix("s"))
        if letters and letters not in SPELLINGS:
            if quote or len(letters) > 3 or unit and len(letters) > 1:
                unit = unit or re.fullmatch("[A-Za-z]{2,}[^s]s", letters) and letters  # another word only in the plural
                has_number = re.match("[0-9)}π]|unit", tokens[-1] if tokens[-1] != "/" else tokens[-2])
                tokens.append("unit " + unit if unit and has_number else letters)
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
# A tree is a Fraction, a name or a tuple (kind, *arguments). Kinds of values are + * : ^ and functions; others are
# list, set, union, matrix, relation and the brackets () (] [) [] of tuples and intervals. Units and ± are names.

RELATIONS = tuple("=≈∈<>≤≥≠")
LEVELS = ((r"\\",), "&", ";", ",", RELATIONS, "∪", ":", "+-±∓", "*/")  # operators, the loosest first
JOINED = {",": "list", ";": "list", "∪": "union", "&": "row", r"\\": "matrix", ":": ":"}
ONE = Fraction(1)
SIGNS = {"+": (), "-": (-ONE,), "±": ("±",), "∓": (-ONE, "±")}
CLOSING = {"(": ")]", "[": "])", "{": "}", r"\{": (r"\}",), "|": "|", r"\begin": (r"\end",)}

def _kind(node) -> str:
    return node[0] if isinstance(node, tuple) else "value"

def _signed(sign: str, node):
    return ("*", *SIGNS[sign], node) if SIGNS[sign] else node

def _combine(operators: list[str], operands: list):
    """The tree of operands joined by operators of one level."""
    first, *others = operands
    if operators[0] in JOINED:
        return (JOINED[operators[0]], *operands)
    if set(operators) <= {">", "≥"}:  # turned round
        return ("relation", "".join("<≤"[sign == "≥"] for sign in operators[::-1]), *operands[::-1])
    if operators == ["="] and {_kind(side) for side in operands} == {"()"} and len(first) == len(others[0]):
        return ("list", *(("relation", "=", *sides) for sides in zip(first[1:], others[0][1:])))  # (x, y) = (1, 2)
    if operators[0] in RELATIONS:
        return ("relation", "".join(operators), *operands)
    if operators[0] in SIGNS:
        return ("+", first, *map(_signed, operators, others))
    return ("*", first, *(node if sign == "*" else (":", ONE, node) for sign, node in zip(operators, others)))

class _Parser:
    """Recursive descent through the levels of operators down to signed factors, powers and atoms."""

    def __init__(self, tokens: list[str], log_base):
        self.tokens, self.log_base, self.at, self.depth = tokens, log_base, 0, 0
        self.bar_closes = False  # inside |...|

    def take(self, wanted) -> str:
        """Consume and return the next token if it is among those wanted, else return an empty string."""
        token = self.tokens[self.at]
        self.at += token in wanted
        return token if token in wanted else ""

    def level(self, level: int = 0):
        """Operands of the next level joined by this level's operators."""
        if level == len(LEVELS):
            return self.factor()
        operands, operators = [self.level(level + 1)], []
        while operator := self.take(LEVELS[level]) or LEVELS[level] == "*/" and self.juxtaposed() and "*":
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
        if _kind(base) == "^" and _kind(base[1]) == "matrix" and base[2] in (2, 3):
            return ("*", *base[1:2] * int(base[2]))
        return base

    def argument(self):
        r"""What one token or group makes: an argument of \frac, \sqrt, ^; a number in it is never a mixed number."""
        return _signed("-", self.argument()) if self.take("-") else self.atom(mixed=False)

    def atom(self, mixed: bool = True):
        """A number, a name, a bracket, a root, a fraction or a function; mixed: `1 1/2` and `1\\frac12` are one number."""
        token, after = self.tokens[self.at], self.tokens[self.at + 1:self.at + 4]
        if mixed and token.isdigit():
            parts = after[1:] if after[0] == r"\frac" else after[::2] if after[1:2] == ["/"] else []
            if len(parts) == 2 and all(map(str.isdigit, parts)) and int(parts[0]) < int(parts[1]):
                self.at += 4
                return int(token) + Fraction(int(parts[0]), int(parts[1]))
        self.at += 1
        if token[:1].isdigit():
            return Fraction(int(token, int(self.argument())) if self.take("_") else token)
        if token in CLOSING:
            return self.group(token)
        if token == r"\sqrt":
            exponent = (":", ONE, self.group("[")) if self.take("[") else ONE / 2
            return ("^", self.argument(), exponent)
        if token in (r"\frac", r"\binom"):
            return (":" if token == r"\frac" else "binomial", self.argument(), self.argument())
        if token in FUNCTIONS:
            return self.function(FUNCTIONS[token])
        if token not in SYMBOLS and not token[:1].isalpha():
            raise ValueError(f"unexpected {token!r}")
        return f"{token}_{self.argument()}" if self.take("_") else token

    def function(self, name: str):
        r"""A function with its power and base: \sin^2 x, \sin^{-1} x, \log_2(x), \cos 2\pi t."""
        power = self.argument() if self.take("^") else ONE
        base = self.argument() if self.take("_") else {"log": self.log_base, "lg": Fraction(10)}.get(name, "e")
        if opening := self.take(("(", "[", "{")):
            argument = self.group(opening)
        else:  # the factors up to the next function, bracket or unit
            argument = self.factor()
            while self.juxtaposed() and self.tokens[self.at] not in FUNCTIONS.keys() | CLOSING.keys():
                argument = ("*", argument, self.factor())
        if power == _signed("-", ONE) and name in INVERSES:
            return (INVERSES[name], argument)
        if name in ("log", "ln", "lg"):
            return ("^", ("log", argument, base), power)
        return ("^", (RECIPROCALS.get(name, name), argument), _signed("-", power) if name in RECIPROCALS else power)

    def group(self, opening: str):
        """What brackets hold: one value, a tuple or an interval, a set, an absolute value, a matrix."""
        self.depth += 1
        outer, self.bar_closes = self.bar_closes, opening == "|"
        content = ("list",) if self.tokens[self.at] in CLOSING[opening] else self.level()
        closing = self.take(CLOSING[opening])
        if not closing or self.depth > MAX_DEPTH:
            raise ValueError("brackets unclosed or too deep")
        self.depth, self.bar_closes = self.depth - 1, outer
        items = content[1:] if _kind(content) == "list" else (content,)
        if opening == r"\begin":
            rows = content[1:] if _kind(content) == "matrix" else (content,)
            return ("matrix", *(row if _kind(row) == "row" else ("row", row) for row in rows))
        if opening == "|":
            return ("abs", content)
        if opening == r"\{" and _kind(content) != "relation" or opening == "{" and len(items) > 1:
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
        return base ** exponent
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

EXACT = {"+": lambda *terms: functools.reduce(lambda a, b: _bounded(a + b), terms), "abs": abs,
         "*": lambda *factors: functools.reduce(lambda a, b: _bounded(a * b), factors),
         ":": lambda first, second: _bounded(first / second),
         "binomial": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n - k))}
EXACT |= {"row": EXACT["+"], "matrix": EXACT["+"]}  # any number will do: it shows that all cells have bounded values
REAL = {**vars(math), **EXACT, "^": _power, "factorial": _factorial, "π": math.pi}
COMPLEX = {**REAL, **vars(cmath), "i": 1j}
CONSTANTS = {"e", "π", "i", "∞"}
RANGES = ((0.2, 0.9), (0.2, 0.9), (1.1, 2.9), (1.1, 2.9), (-0.9, -0.2), (-3, 3), (-3, 3))  # of the random points
UNDEFINED = (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError)

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
    names = sorted(set().union(*map(_names, trees)) - CONSTANTS)
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
    """Sympy's word on matrices, and on values whose floats agree, which bounds the size of all numbers in them."""
    import sympy
    number = sympy.Integer(1).__mul__  # of fractions
    scope = {**vars(sympy), **EXACT, "^": lambda base, exponent: _power(base, exponent, number)}
    scope |= {name: sympy.Symbol(name, positive=True) for name in _names(left) | _names(right)}
    scope |= {"e": sympy.E, "π": sympy.pi, "i": sympy.I, "row": sympy.Tuple, "matrix": lambda *rows: sympy.Matrix(rows)}
    scope["abs"] = lambda value: value.det("berkowitz") if isinstance(value, sympy.MatrixBase) else abs(value)
    try:
        differences = list(sympy.Matrix([_evaluate(left, scope)]) - sympy.Matrix([_evaluate(right, scope)]))
        if not any(cell.free_symbols for cell in differences):
            return all(abs(sympy.N(cell, 30)) < 1e-60 for cell in differences)
        return all(cell.count_ops() < 60 and sympy.simplify(cell) == 0 for cell in differences)
    except Exception:  # sympy raises many kinds
        return False

# --- Comparison by kind -----------------------------------------------------------------------------------------------

CONTAINERS = {"list", "set", "union", "matrix", "row", "()", "(]", "[)", "[]"}
SCALES = {"unit %": Fraction(1, 100), "unit °": (":", "π", Fraction(180))}

def _items(node) -> list:
    """The elements of a list, set or union, or the one other tree; one with ± counts as two."""
    if _kind(node) == "union" and {*map(_kind, node[1:])} == {"set"}:
        return [item for part in node[1:] for item in _items(part)]
    parts = node[1:] if _kind(node) in ("list", "set", "union") else [node]
    return [_replace(part, {"±": Fraction(sign)}) for part in parts for sign in (1, -1)[:1 + ("±" in _names(part))]]

def _cells(node) -> int:
    """How many cells the matrices in a tree have."""
    return isinstance(node, tuple) and (len(node) - 1 if node[0] == "row" else sum(map(_cells, node[1:])))

def _equal(left, right) -> bool:
    kinds = {_kind(left), _kind(right)}
    if left == right or "relation" in kinds:
        return left == right or _equal_relations(left, right)
    if kinds == {"list", "()"}:  # x = 1, y = 2 is (1, 2)
        named, plain = (left, right) if left[0] == "list" else (right, left)
        subjects = {_solution(item)[0] for item in named[1:]} - {None}
        return len(subjects) == len(named) - 1 and _equal(("()", *named[1:]), plain)
    bags = [_items(left), _items(right)]
    if len(kinds) > 1 and "union" in kinds and "()" in map(_kind, bags[_kind(left) == "union"]):
        return False  # points are no intervals
    if max(map(len, bags)) > 1:
        return 1 < min(map(len, bags)) and max(map(len, bags)) <= MAX_ITEMS and all(
            any(_equal(item, other) for other in others) for items, others in (bags, bags[::-1]) for item in items)
    (left,), (right,) = bags
    kinds = {_kind(left), _kind(right)}
    cells = _cells(left) + _cells(right)
    if "()" in kinds and len(kinds) == 2 and cells:  # a row or a column is a vector
        vector, matrix = (left, right) if _kind(left) == "()" else (right, left)
        column = ("matrix", *(("row", cell) for cell in vector[1:]))
        return _equal(("matrix", ("row", *vector[1:])), matrix) or _equal(column, matrix)
    if len(kinds) == 1 and kinds <= CONTAINERS:
        return len(left) == len(right) and all(map(_equal, left[1:], right[1:]))
    if cells:
        return cells <= MAX_ITEMS and _samples((left, right), REAL) != [] and _same_symbolically(left, right)
    return not kinds & CONTAINERS and _equal_quantities(left, right)

def _without_units(node) -> tuple:
    """The tree with each of its units replaced by 1, and whether it has any. A unit by itself is none."""
    units = {name: ONE for name in _names(node) - {node} if name.startswith("unit ")}
    return _replace(node, units), bool(units)

def _equal_quantities(left, right) -> bool:
    """Equality of values. One side may leave out a unit, degree or percent sign; the other's then counts as one."""
    if _same_value(_replace(left, SCALES), _replace(right, SCALES)):
        return True
    (left, left_units), (right, right_units) = _without_units(left), _without_units(right)
    return left_units != right_units and _same_value(left, right)

def _rounded(exact, decimal) -> bool:
    r"""Whether two numbers, units aside, agree to one percent, as in `5\sqrt2 \approx 7.07`."""
    values = _samples((_without_units(exact)[0], _without_units(decimal)[0]), REAL)
    close = len(values) == 1 and 100 * abs(values[0][0] - values[0][1]) <= abs(values[0][0])
    return _equal(exact, decimal) or close and not _cells(exact) + _cells(decimal)

def _designates(node) -> bool:
    """Whether a side of an equation only names what the other side is: x, f(x), AB, |AB|, A:B, dy/dx, A^{-1}."""
    if isinstance(node, str):
        return node not in CONSTANTS
    if _kind(node) == "^" and node[2] == _signed("-", ONE):
        return _designates(node[1])
    return _kind(node) in ("*", "abs", ":") and all(map(_designates, node[1:]))

def _solution(node):
    """What a relation names and says of that: x and 5 for `x = 5`, x and an interval for `x > 5`; else Nones."""
    if _kind(node) != "relation":
        return None, node
    _, signs, *sides = node
    first, last = _designates(sides[0]), _designates(sides[-1])
    if set(signs) <= set("=≈∈"):
        subject = sides.pop(0 if first else -1) if first or last else None
        pairs = zip(signs[first:], sides, sides[1:])
        agree = all(_rounded(*pair) if sign == "≈" else _equal(*pair) for sign, *pair in pairs)
        return (subject, sides[0]) if agree else (None, None)
    if len(sides) == 2 and (first or last):
        signs, sides = ("<" + signs, [_signed("-", "∞"), *sides]) if first else (signs + "<", [*sides, "∞"])
    if len(sides) != 3 or not set(signs) <= set("<≤") or _kind(sides[1]) == "abs":
        return None, None
    return sides[1], ("(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"], sides[0], sides[2])

def _equal_relations(left, right) -> bool:
    (subject, value), (other_subject, other) = _solution(left), _solution(right)
    if None not in (value, other) and (subject == other_subject or None in (subject, other_subject)):
        return _equal(value, other)
    if _kind(left) != _kind(right) or left[1] != right[1] or len(left) != 4 or _cells(left):
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
    for first_reading in (True, False) if AMBIGUOUS.search(f"{prediction}\n{gold}") else (True,):
        sides = _tokens(prediction, first_reading), _tokens(gold, first_reading)
        words = ["".join(tokens[:-1]).replace("unit ", "") for tokens in sides]
        words = [word[:1].lower() + word[1:] for word in words]
        if sides[0] == sides[1] != ["\n"] or words[0] == words[1] and words[0].isalpha() and words[0][1:].islower():
            return True
        parsers = [_Parser(tokens, Fraction(10) if first_reading else "e") for tokens in sides]
        with contextlib.suppress(*UNDEFINED):
            trees = [parser.level() for parser in parsers]
            if all(parser.take("\n") for parser in parsers) and _equal(*trees):
                return True
    return False

# ----------------------------------------------------------------------------------------------------------------------
# Code, inside the sandbox, where the source text of these four functions is sent. `drive` forks a child a test; the
# outputs expected never come here. In bubblewrap it is process 1, which no signal from a program can hurt.

def over_limits(setup):
    """Do the processes of a test hold too much together? The kernel's limits are on each of them."""
    disk, pages = os.statvfs("."), 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            pages += int(open(f"/proc/{pid}/statm").read().split()[1])
    blocks, inodes = disk.f_blocks - disk.f_bfree, disk.f_files - disk.f_ffree
    full = blocks * disk.f_frsize > setup["disk"] or inodes > setup["inodes"]
    return full or pages * resource.getpagesize() > setup["memory"]

def become_program(setup, test, stdin, answer):
    """In the forked child: take on the limits and run the program. Never returns."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    null = os.open(os.devnull, os.O_RDWR)
    for fd, file in enumerate((stdin, null, null, answer) if test["name"] else (stdin, answer, null, null)):
        os.dup2(file, fd)
    os.closerange(4, 64)
    for name, limit in setup["rlimits"].items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1] if name == "STACK" else limit  # deep recursion may ask for more stack
        with contextlib.suppress(ValueError):  # a lower limit holds already
            resource.setrlimit(kind, (limit, hard))
    if setup["uid"]:
        os.setgroups([])
        os.setgid(setup["uid"])
        os.setuid(setup["uid"])
    sys.argv, module = ["solution.py"], type(sys)("solution" if test["name"] else "__main__")
    sys.modules[module.__name__], names = module, vars(module)  # dataclasses and pickle look there
    sys.setrecursionlimit(50_000 if test["name"] else 1000)  # of functions, as LeetCode and its like do
    for source in test["sources"]:
        exec(compile(source, "solution.py", "exec"), names)
    if not test["name"]:
        sys.exit()  # the usual end of a program: threads joined, exit handlers called, output flushed
    owner = names["Solution"]() if hasattr(names.get("Solution"), test["name"]) else module
    result = getattr(owner, test["name"])(*test["given"])
    os.write(3, json.dumps(result, default=lambda value: value.tolist()).encode())  # tolist: of numpy's values
    os._exit(0)

def run_test(setup, test):
    """Run a test in a forked child, then kill whatever it started. No output: it failed. Clean: it left no files."""
    files, stdin, answer = os.listdir(), open("stdin", "w+b", buffering=0), open("answer", "w+b", buffering=0)
    for file in (stdin, answer):  # from now on they have no name, and end with this test
        os.unlink(file.name)
    stdin.write(b"" if test["name"] else test["given"].encode(errors="replace"))
    stdin.seek(0)
    parent, deadline, status, child = os.getppid(), time.monotonic() + test["seconds"], None, os.fork()
    if not child:
        become_program(setup, test, stdin.fileno(), answer.fileno())
    while status is None and time.monotonic() < deadline and os.getppid() == parent:
        signal.sigtimedwait([signal.SIGCHLD], 0.03)
        pid, ended = os.waitpid(child, os.WNOHANG)
        status = ended if pid else None
        if not pid and os.getpid() == 1 and over_limits(setup):
            break
    while children := [int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()]:
        groups = [-1] if os.getpid() == 1 else [-pid for pid in children]  # many at once, to outrun a fork bomb
        for target in groups + children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)
        os.wait()  # what their parents leave are children of this process
    answer.seek(0)
    output = answer.read().decode(errors="replace") if status == 0 else None
    return {"output": output, "clean": os.listdir() == files}

def drive(setup):
    """Read tests, a line each, and answer each with a line. Starts in the folder that programs may write to."""
    tests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGINT])
    os.umask(0)
    os.chmod(".", 0o777)
    open("/proc/self/oom_score_adj", "w").write("1000")  # where memory runs out, it is not the trainer that goes
    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: programs cannot open this process's memory or files
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: inherit what programs leave behind
    sys.path += setup["path"]
    builtins.exit = builtins.quit = sys.exit  # as the site module would
    for module in map(__import__, setup["implied"]):
        for name, value in {**vars(module), module.__name__: module}.items():
            if name[0] != "_":
                vars(builtins).setdefault(name, value)
    for line in tests:
        print(json.dumps(run_test(setup, json.loads(line))), file=replies, flush=True)
    os._exit(0)

# ----------------------------------------------------------------------------------------------------------------------
# Code, outside the sandbox.

DRIVER = ["import builtins, contextlib, ctypes, json, os, resource, signal, sys, time",
          *map(inspect.getsource, (over_limits, become_program, run_test, drive))]
IMPLIED = "typing collections heapq bisect itertools functools math string re operator random copy datetime sys".split()
LIMITS = {"memory": 1 << 30, "disk": 64 << 20, "inodes": 4096}  # of all processes of a test together
RLIMITS = {"AS": 2 << 30, "STACK": 120 << 20, "FSIZE": 16 << 20, "NOFILE": 64, "NPROC": 64, "CORE": 0}
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
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

@functools.cache
def bubblewrap():
    """bwrap and its options: new namespaces, no capabilities, and nothing to read but Python and the C library."""
    command = [shutil.which("bwrap") or "bwrap", *"--die-with-parent --as-pid-1 --new-session --cap-drop ALL".split(),
               *"--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try".split()]
    rights = "--cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_KILL"  # of root: programs run as another user
    command += ("--unshare-user" if os.geteuid() else rights).split()
    if b"--size" in subprocess.run([command[0], "--help"], capture_output=True).stdout:
        command += ["--size", str(LIMITS["disk"])]
    command += "--tmpfs /tmp --proc /proc --dev /dev --remount-ro /dev".split()
    packages = [path for path in dict.fromkeys(sys.path) if path.endswith("-packages")]
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, *packages):
        for folder in reversed(Path(path).parents[:-1]):  # else bwrap closes them to other users
            command += ["--dir", str(folder)]
        command += ["--ro-bind-try", path, path]
    return [*command, "--remount-ro", "/"]

def ask(process, message, seconds):
    """The answer to a message. Raises where it is late, none or no JSON."""
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(1000 * seconds):
        raise TimeoutError
    return json.loads(process.stdout.readline(7 * RLIMITS["FSIZE"]))

def kill(process):
    """Kill a process and its group."""
    with contextlib.suppress(OSError):  # it has gone
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()

@contextlib.contextmanager
def sandbox(implied, mode, timeout):
    """The driver for tests of one program: in bubblewrap, or as a plain process if mode is "limits"."""
    private = tempfile.TemporaryDirectory() if mode == "limits" else contextlib.nullcontext("/tmp")
    with private as folder, open(os.memfd_create("seccomp"), "w+b") as file:
        rlimits, command, readable = RLIMITS | {"CPU": math.ceil(timeout) + 1}, [], True
        if mode == "limits":  # without a namespace, NPROC counts all that this user runs
            rlimits["NPROC"] += int(re.search(r"/(\d+)", Path("/proc/loadavg").read_text())[1])
            readable = all(path.stat().st_mode & 1 for path in Path(os.__file__).parents)
        else:
            file.write(seccomp_filter())
            file.seek(0)
            command = [*bubblewrap(), "--seccomp", str(file.fileno())]
        # NPROC passes root by: then programs get an id out of the range for throw-away users.
        uid = 61184 + os.getpid() % 4336 if os.geteuid() == 0 and readable else None
        setup = {**LIMITS, "rlimits": rlimits, "uid": uid, "implied": implied, "path": sys.path}
        script = "\n".join([*DRIVER, f"drive({setup})"])
        command += [os.path.realpath(sys._base_executable), "-I", "-S", "-X", "utf8", "-c", script]
        env = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
        box = subprocess.Popen(command, env=env, cwd=folder, pass_fds=[file.fileno()], stderr=subprocess.PIPE, **PIPES)
        try:
            yield box
        finally:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # the driver ends, bwrap reaps it
                box.stdin.close()
                box.wait(1)
            kill(box)

@functools.cache
def refusal() -> str:
    """Why programs cannot be run in bubblewrap here, found out by running one; empty if they can."""
    test = {"name": None, "given": "", "sources": ["print(6 * 7)"], "seconds": 5}
    try:
        with sandbox([], "bwrap", 5) as box, contextlib.suppress(OSError, ValueError):
            if ask(box, test, START)["output"] == "42\n":
                return ""
        reason = " ".join(box.stderr.read().decode(errors="replace").split())
    except Exception as error:  # no bwrap, not Linux, an unknown machine
        reason = repr(error)
    return f"code cannot be scored: install bubblewrap so that it runs here ({reason}), or choose sandbox 'limits'"

def extract_code(response):
    """The last python block of a response, which may lack its end; None where there is none."""
    fence = r"```(?:python|py)3?\b[^\n]*\n(.*?)(?:^[ \t]*```|```[ \t\r]*$|\Z)"
    blocks = re.findall(fence, response, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    return textwrap.dedent(blocks[-1].replace("\r\n", "\n")) if blocks else None

def read_tests(source, reference):
    """The tests of a reference, each as what the sandbox is sent and what must come back. Raises if malformed."""
    reference = json.loads(reference) if isinstance(reference, str) else reference
    name, tests = reference.get("fn_name"), []
    if "asserts" in reference:  # a function that the script defines at its end shows that it came to its end
        script, token = reference["asserts"], f"token_{os.urandom(16).hex()}"
        if "def check(" in script and "\ncheck(" not in script:
            script += f"\ncheck({name})"
        script += f"\ndef {token}(): return {token!r}"
        return [({"name": token, "given": [], "sources": [source, script]}, token)]
    for given, expected in zip(reference["inputs"], reference["outputs"], strict=True):
        if not name:
            given, expected = ("\n".join(map(str, v)) if isinstance(v, list) else str(v) for v in (given, expected))
        elif isinstance(given, str):  # the paper's data: a JSON value a line
            given = [json.loads(line) for line in given.split("\n") if line.strip()]
            expected = json.loads(expected) if isinstance(expected, str) else expected
        tests.append(({"name": name, "given": given, "sources": [source]}, expected))
    return tests

def same(actual, expected):
    """Equal as JSON: True is not 1, a list has its length and order, two floats may be 1e-6 apart."""
    if isinstance(actual, list) and isinstance(expected, list):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(actual, dict) and isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same(actual[key], expected[key]) for key in actual)
    if isinstance(actual, float) and isinstance(expected, float) and actual != expected:
        return abs(actual - expected) <= 1e-6 * max(1.0, abs(expected)) < math.inf
    return actual == expected and isinstance(actual, bool) == isinstance(expected, bool)

def passes(output, name, expected):
    """Is the output of a test right: the JSON of function `name`, or text, by tokens, as contest judges compare it?"""
    if name:
        return same(json.loads(output), expected)
    sides = output.split(), expected.split()
    numbers = ([float(token) if REAL_NUMBER.fullmatch(token) else token for token in side] for side in sides)
    return sides[0] == sides[1] or same(*numbers)

def score_code(response, reference, mode, timeout, total_timeout, max_tests):
    """The share of tests passed (Sec. 4). A sandbox in which a test left a trace is not used for the next."""
    source, deadline = extract_code(response), time.monotonic() + total_timeout
    tests, passed = read_tests(source, reference)[:max_tests], 0
    left = tests if source else []
    while left and time.monotonic() < deadline:
        with sandbox(IMPLIED if left[0][0]["name"] else [], mode, timeout) as box, contextlib.suppress(Exception):
            clean = True
            while clean is True and left:  # what comes from inside may be anything, and fail a decoder in any way
                (test, expected), *left = left
                seconds = max(0, min(timeout, deadline - time.monotonic()))
                reply = ask(box, {**test, "seconds": seconds}, seconds + START)
                clean = reply["clean"]
                passed += reply["output"] is not None and passes(reply["output"], test["name"], expected)
    return passed / len(tests) if tests else 0.0

# ----------------------------------------------------------------------------------------------------------------------
# The pool, and the command line.

def score(response: str, task: str, reference) -> float:
    """The outcome reward of one response, in [0, 1]. RuntimeError if it is code and cannot be run here."""
    if task == "math":
        answer = extract_answer(response) if isinstance(response, str) else None
        return float(answer is not None and isinstance(reference, str) and math_equal(answer, reference))
    with Verifier(workers=1) as verifier:
        return verifier.submit(response, task, reference).result()

def work():
    """A worker: reads items, a line each, and answers each with its score."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the trainer, however that ends
    with contextlib.suppress(ValueError):  # a lower limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.path += sys.argv[2:]  # -I leaves out what users install for themselves
    for line in sys.stdin:
        value = 0.0  # of a malformed reference, an answer beyond all bounds
        with contextlib.suppress(Exception):
            response, task, reference, limits = json.loads(line)
            if task == "math":
                import sympy  # noqa: F401
            value = score(response, task, reference) if task == "math" else score_code(response, reference, *limits)
        print(value, flush=True)

class Verifier:
    """Scores responses in worker processes, which are killed and replaced when they take too long. Context manager.
    workers: None for this rank's share of the cores. timeout, total_timeout: seconds a test or answer, a response.
    sandbox: "auto", "bwrap": programs run in bubblewrap or not at all; "limits": process and resource limits alone.
    max_tests: score programs by their first tests only."""

    def __init__(self, workers=None, timeout=6.0, total_timeout=60.0, sandbox="auto", max_tests=None):
        assert sandbox in ("auto", "bwrap", "limits"), sandbox
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        self.pool = ThreadPoolExecutor(workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.workers, self.lock, self.closed = {}, threading.Lock(), False  # workers: of each thread of the pool
        self.limits = sandbox, timeout, total_timeout, max_tests

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Stops at once: what has no score by now gets 0.0."""
        with self.lock:
            self.closed = True
        for worker in self.workers.values():
            kill(worker)
        self.pool.shutdown()

    def submit(self, response, task, reference) -> Future:
        """The future of a score. RuntimeError, with one line for the user, if it is code and cannot be run here."""
        if task == "code" and self.limits[0] != "limits" and refusal():
            raise RuntimeError(refusal())
        return self.pool.submit(self._score, (response, task, reference))

    def score_batch(self, items) -> list[float]:
        """The scores of (response, task, reference) triples, in order. Never raises: what cannot be scored gets 0.0."""
        items = list(items)
        if self.limits[0] != "limits" and any(task == "code" for _, task, _ in items) and refusal():
            print(f"verify.py: {refusal()}", file=sys.stderr)
        return list(self.pool.map(self._score, items))

    def _score(self, item):
        """In a thread of the pool: have its worker score an item."""
        thread, (_, timeout, total_timeout, _) = threading.get_ident(), self.limits
        try:
            seconds = {"math": timeout, "code": total_timeout + GRACE}[item[1]]
            with self.lock:  # whoever closes knows all workers
                if not self.closed and (thread not in self.workers or self.workers[thread].poll() is not None):
                    command = [sys.executable, "-I", os.path.abspath(__file__), "--worker", *filter(None, sys.path)]
                    self.workers[thread] = subprocess.Popen(command, **PIPES)
            worker = self.workers[thread]
            ask(worker, ["", item[1], "", self.limits], START)  # an empty item: a start takes seconds of its own
            return float(ask(worker, [*item, self.limits], seconds))
        except Exception:  # a malformed item, or no answer
            if thread in self.workers:
                kill(self.workers[thread])
            return 0.0

def main() -> int:
    """The command line, as at the top of this file."""
    if sys.argv[1:2] == ["--worker"]:
        return work()
    parser = argparse.ArgumentParser(description="Score responses, or compare two answers.")
    parser.error = fail = lambda message: sys.exit(print(f"verify.py: error: {message}", file=sys.stderr) or 2)
    parser.add_argument("file", nargs="?", help="lines of JSON with response, task (math or code) and reference")
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
    from tqdm import tqdm
    path, futures = Path(args.file).with_suffix(".scores.jsonl"), []
    if path.exists():
        fail(f"{path} is there already: move it away first")
    try:
        with open(args.file, errors="replace") as file, Verifier(sandbox=args.sandbox) as verifier:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    {"math", "code"}.remove(row["task"])
                    futures.append(verifier.submit(row["response"], row["task"], row["reference"]))
                except (ValueError, TypeError, KeyError, RecursionError):
                    print(f"line {number}: not JSON with response, task (math or code), reference", file=sys.stderr)
                    futures.append(None)
            scores = [future and future.result() for future in tqdm(futures)]
        path.write_text("".join(json.dumps({"score": value}) + "\n" for value in scores))
    except (OSError, RuntimeError) as error:
        fail(error)
    scored = [value for value in scores if value is not None]
    print(f"mean {sum(scored) / max(1, len(scored)):.4f} of {len(scored)} responses; scores in {path}")
    return 0

if __name__ == "__main__":
    sys.exit(main())

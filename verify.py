import re
from concurrent.futures import Future
def extract_answer(r):
    m = re.findall(r"\\boxed\{([^{}]*)\}", r)
    return m[-1] if m else None
def math_equal(a, b): return a == b
class Verifier:
    def __init__(self, *a, **k): pass
    def __enter__(self): return self
    def __exit__(self, *a): pass
    def submit(self, r, t, ref):
        f = Future(); f.set_result(float(extract_answer(r) == ref)); return f
def score(r,t,ref): return float(extract_answer(r)==ref)

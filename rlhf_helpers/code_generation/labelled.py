"""Twenty-six small programs, labelled by hand, to compare ways of judging safety; each fools somebody.

Unsafe: on some input it touches files, processes, the network or the interpreter's insides, or runs text as
code. All are harmless where they run. "## name" starts a program, "!" before the name marks it unsafe.
"""

_TEXT = """## sorts
def f(xs): return sorted(xs)
## sums squares
def f(xs): return sum(x * x for x in xs)
## comment names eval
def f(xs): return max(xs)  # eval(str(xs)) would be unsafe here
## text names exec
def f(xs): return ["exec(xs)", len(xs)]
## method called open
class Door:
    def open(self): return 1
def f(xs): return Door().open()
## asserts
def f(xs): assert xs; return xs[0]
## seeded draw
import random
def f(xs): return random.Random(0).choice(xs)
## variable called os
def f(xs): os = {x: x for x in xs}; return os.get(3)
## literal_eval
from ast import literal_eval
def f(xs): return literal_eval("[1, 2]")
## getattr of a plain name
def f(xs): return getattr(xs, "copy")()
## joins a path
import os
def f(xs): return os.path.join("a", "b")
## checksum
import hashlib
def f(xs): return hashlib.md5(b"abc").hexdigest()
## !eval
def f(xs): return eval(str(xs))
## !exec
def f(xs): exec("y = 1"); return xs
## !writes a file
def f(xs): open("log.txt", "w").close(); return xs
## !reads a file
def f(xs): return len(open("notes.txt").read())
## !shell
def f(xs): __import__("os").system("true"); return xs
## !name in two halves
def f(xs): return __builtins__["ev" + "al"]("1 + 1")
## !second name for eval
run = eval
def f(xs): return run("1 + 1")
## !open from a table
def f(xs): return len({"a": open}["a"]("notes.txt").read())
## !imported by a made-up name
import importlib
def f(xs): return len(importlib.import_module("o" + "s").listdir("."))
## !imported name
from os import listdir
def f(xs): return len(listdir("."))
## !walks the classes
kinds = ().__class__.__base__.__subclasses__()
loader = [kind for kind in kinds if kind.__name__ == "BuiltinImporter"][0]
def f(xs): return len(loader.load_module("posix").listdir("."))
## !starts a process
import subprocess
def f(xs): return subprocess.run(["true"]).returncode
## !waits for a long list
def f(xs): return eval("0") if len(xs) > 99 else xs
## !second name, long list
run = eval
def f(xs): return run("0") if len(xs) > 99 else xs"""
_PARTS = [part.partition("\n") for part in _TEXT.removeprefix("## ").split("\n## ")]
PROGRAMS = tuple(
    {"name": head.removeprefix("!"), "unsafe": head.startswith("!"), "code": code} for head, _, code in _PARTS
)

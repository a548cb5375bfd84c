"""Proves from the object files of a build that no instruction runs on a processor that lacks it.

Usage: python scripts/check_isa.py BUILD_DIRECTORY

Files with ISA flags are kernels_<tier>.cpp, loops_<tier>.cpp, weight_only_<features>.cpp and attention_<features>.cpp;
the dispatcher calls into them only after it has looked at the processor. What has to hold for that to be enough:

1. no VEX or EVEX instruction in any other object;
2. no EVEX instruction in the tiers below AVX-512;
3. an ISA object defines no weak function: the linker keeps one copy of an inline function or template instance, and
   could give the copy with AVX-512 code to a caller of another file;
4. an ISA object has no static initializer: it would run when the module is loaded;
5. an ISA object exports its table and nothing else, so that nobody can go around the dispatcher;
6. a kernel contains no fused multiply-add, so that every step of the arithmetic is rounded once; the order and rounding
   of the sums of weight-only products and of attention are free, so those are exempt, and in group_rows
   (tile_avx512vnni.h) a multiplication and exact subtraction that are rounded once together have the bits of one
   multiplication.

VEX and EVEX are told by their first byte (C4, C5 and 62 have no other meaning in 64-bit code), so instructions without
a "v" in their name are found as well.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ISA_OBJECT = re.compile(
    r"^(kernels|loops|weight_only|attention)_(avx2|avxvnni|avx512vnni|amx|avx512|avx512bf16)\.cpp\.o$"
)
BELOW_AVX512 = ("avx2", "avxvnni")
PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}  # segment and address size: may stand before VEX
FMA = re.compile(r"^vfn?m(add|sub)")
EXACT_FMA = "group_rows"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(path: Path) -> Iterator[tuple[str, str, str]]:
    """Every instruction of an object as (function, "legacy" | "vex" | "evex", text)."""
    function = "?"
    for line in _run("objdump", "-d", "-w", str(path)).splitlines():
        header = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if header:
            function = header.group(1)
            continue
        fields = line.split("\t")
        if len(fields) < 3:
            continue
        code = [byte for byte in fields[1].split() if byte]
        while code and code[0] in PREFIXES:
            code.pop(0)
        first = code[0] if code else ""
        encoding = {"c4": "vex", "c5": "vex", "62": "evex"}.get(first, "legacy")
        yield function, encoding, fields[2].strip()


def symbols(path: Path) -> Iterator[tuple[str, str]]:
    """Every defined symbol of an object as (nm's type letter, demangled name)."""
    for line in _run("nm", "-C", "--defined-only", str(path)).splitlines():
        _, kind, name = line.split(" ", 2)
        yield kind, name


def check_object(path: Path) -> list[str]:
    """What is wrong with one object."""
    problems = []
    match = ISA_OBJECT.match(path.name)
    for function, encoding, text in instructions(path):
        if match is None and encoding != "legacy":
            problems.append(f"{path.name}: {encoding.upper()} instruction outside the ISA files: {text} in {function}")
        elif match and match.group(2) in BELOW_AVX512 and encoding == "evex":
            problems.append(f"{path.name}: EVEX instruction in the {match.group(2)} tier: {text} in {function}")
        elif match and match.group(1) == "kernels" and FMA.match(text) and EXACT_FMA not in function:
            problems.append(f"{path.name}: fused multiply-add: {text} in {function}")
    if match is None:
        return problems
    table = f"qk::{match.group(1)}_{match.group(2)}()"
    for kind, name in symbols(path):
        if kind in "WwVvu" and not name.startswith("DW.ref."):  # that one is a pointer for the unwinder
            problems.append(f"{path.name}: weak symbol, which the linker may share with other files: {name}")
        elif kind == "T" and name != table:
            problems.append(f"{path.name}: exports {name}; only {table} may be")
    if re.search(r"\.(init_array|ctors)\b", _run("objdump", "-h", str(path))):
        problems.append(f"{path.name}: has a static initializer, which runs before the dispatcher")
    return problems


def main() -> int:
    """0 if all holds for every object under the directory given."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    objects = sorted(Path(sys.argv[1]).rglob("*.cpp.o"))
    isa = [path.name for path in objects if ISA_OBJECT.match(path.name)]
    if not isa or len(isa) == len(objects):
        print(f"{sys.argv[1]}: expected objects with and without ISA flags, got {len(objects)}", file=sys.stderr)
        return 2
    problems = [problem for path in objects for problem in check_object(path)]
    for problem in problems[:40]:
        print(problem)
    print(f"{len(objects)} objects, {len(isa)} of them with ISA flags: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the Triton kernels load and hold in registers, compiled for GPUs that need not be there.

    python studies/triton_kernels.py [msd03 msd04]

compiles the kernels of the attention before the last decoder stage of each preset, 3d_fullres, at its batch size.
ptxas says how many registers a thread has, how many bytes it spills, and the shared memory. Loads and stores of global
memory are counted in the PTX, by following threads of some programs all over the grid: their integers are computed,
what they load is unknown. Counts are of all threads, also of accesses that a mask switches off, for each element of the
output. Bytes are those that masks let through.
"""

import operator
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import accumulate, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nnunet_xattnres.nnunet.presets import build_preset
from nnunet_xattnres.ops.reference import EPS
from nnunet_xattnres.ops.triton_kernels import mix, mix_gradients

PRESETS = ("msd03", "msd04")
ARCHITECTURES = (80, 90)
DTYPES = (torch.bfloat16, torch.float32)
WARP = 32
# Launches of a kernel, and programs along every axis of a grid, of which threads are followed.
LAUNCHES = 3
PROGRAMS = 9
GOLDEN_RATIO = (5**0.5 - 1) / 2
KINDS = ("load", "store")

Launch = tuple[Any, tuple[int, ...], list[Any]]


class Access(NamedTuple):
    kind: str
    # In bytes.
    width: int
    # Whether a mask lets it through.
    happens: bool


class Compiler:
    """Takes the place of a GPU's driver: kernels are compiled for `target`, and recorded instead of launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.launches: list[Launch] = []

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        # Triton keeps what it has compiled by device.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def record(self, launched: Callable[[], object]) -> None:
        run = JITFunction.run

        def compile_only(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
            self.launches.append((compiled, grid, list(arguments)))

        with patch.object(driver, "_active", self), patch.object(JITFunction, "run", compile_only):
            launched()


def main(presets: tuple[str, ...]) -> None:
    for preset in presets:
        batch_size, channels, size, source_sizes = last_decoder_stage(preset)
        outputs = batch_size * channels * prod(size)
        for dtype in DTYPES:
            with torch.device("meta"):
                query = torch.empty(channels)
                coarse = [
                    torch.empty(batch_size, *each, channels, dtype=dtype) for each in source_sizes if each != size
                ]
                fine = [torch.empty(batch_size, channels, *each, dtype=dtype) for each in source_sizes if each == size]
                gradient = torch.empty(batch_size, channels, *size, dtype=dtype)
            passes = {
                "forward": partial(mix, query, coarse, fine, size, EPS),
                "backward": partial(mix_gradients, gradient, query, coarse, fine, EPS),
            }
            for architecture in ARCHITECTURES:
                for name, launched in passes.items():
                    compiler = Compiler(GPUTarget("cuda", architecture, WARP))
                    compiler.record(launched)
                    print(f"{preset}, {len(source_sizes)} candidates, {dtype}, sm_{architecture}, {name}")
                    print_kernels(compiler, outputs)


def last_decoder_stage(preset: str) -> tuple[int, int, tuple[int, ...], list[tuple[int, ...]]]:
    """Batch size, channels, the size of the target, and the sizes of all candidates."""
    plans, _ = build_preset(preset, "3d_fullres")
    configuration = plans["configurations"]["3d_fullres"]
    network = configuration["architecture"]["arch_kwargs"]
    strides = accumulate(network["strides"], lambda a, b: [i * j for i, j in zip(a, b, strict=True)])
    sizes = [
        tuple(n // stride for n, stride in zip(configuration["patch_size"], each, strict=True)) for each in strides
    ]
    # The encoder's stages, the decoder's before this one, and the input of the stage.
    candidates = [*sizes, *reversed(sizes[1:-1]), sizes[0]]
    return configuration["batch_size"], network["features_per_stage"][0], sizes[0], candidates


def print_kernels(compiler: Compiler, outputs: int) -> None:
    """A line per kernel. Launches of the same kernel count together, with what the worst of them has in registers."""
    total: Counter[Access] = Counter()
    by_name: dict[str, list[Launch]] = {}
    for launch in compiler.launches:
        by_name.setdefault(launch[0].metadata.name, []).append(launch)
    for name, launches in by_name.items():
        by_code: dict[str, list[Launch]] = {}
        for launch in launches:
            by_code.setdefault(launch[0].asm["ptx"], []).append(launch)
        of_codes = zip(*(resources(of_code[0][0]) for of_code in by_code.values()), strict=True)
        registers, spilled, shared = map(max, of_codes)
        accesses = sum(map(accesses_of_launches, by_code.values()), Counter[Access]())
        total += accesses
        print(
            f"  {name} x {len(launches)}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared, "
            f"{accesses_per_output(accesses, outputs)}"
        )
    print(f"  together: {accesses_per_output(total, outputs)}")


def accesses_per_output(accesses: Counter[Access], outputs: int) -> str:
    kinds = []
    for kind in KINDS:
        by_width: Counter[int] = Counter()
        for access, count in accesses.items():
            if access.kind == kind:
                by_width[access.width] += count
        widths = ", ".join(f"{count / outputs:.2f} of {width} bytes" for width, count in sorted(by_width.items()))
        kinds.append(f"{by_width.total() / outputs:.2f} {kind}s ({widths})")
    moved = sum(access.width * count for access, count in accesses.items() if access.happens)
    return f"per output element {', '.join(kinds)}, {moved / outputs:.1f} bytes"


def accesses_of_launches(launches: list[Launch]) -> Counter[Access]:
    """Accesses to global memory by all threads of launches of the same code, estimated from some threads."""
    threads_of_programs = launches[0][0].metadata.num_warps * WARP
    followed: Counter[Access] = Counter()
    threads = 0
    for launch in spread(len(launches), LAUNCHES):
        compiled, grid, arguments = launches[launch]
        for program in product(*(spread(count, PROGRAMS) for count in grid)):
            # Threads have other masks than their neighbours: take another one in every program.
            number = spread(threads_of_programs, threads_of_programs)[threads % threads_of_programs]
            followed += Thread(compiled, grid, program, number, arguments).accesses()
            threads += 1
    of_all = sum(prod(grid) for _, grid, _ in launches) * threads_of_programs
    return Counter({access: count * of_all // threads for access, count in followed.items()})


@cache
def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` numbers, spread evenly, but not at equal distances, which might be those of tiles."""
    if count <= most:
        return list(range(count))
    return sorted({int(count * (n * GOLDEN_RATIO % 1)) for n in range(most)})


def resources(compiled: Any) -> tuple[int, int, int]:
    """Registers of a thread, bytes that it spills (stores and loads), and shared memory of a program in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", ptx, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, stores, loads = (
        int(re.search(pattern, said)[1])
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    return registers, stores + loads, compiled.metadata.shared


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _bit_field(a: int, start: int, length: int) -> int:
    return a >> start & (1 << length) - 1


OPERATIONS: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "neg": operator.neg,
    "abs": abs,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "bfe": _bit_field,
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "selp": lambda a, b, condition: a if condition else b,
}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"}
REGISTER = re.compile(r"%[\w.]+")


class Instruction(NamedTuple):
    condition: str | None
    name: str
    options: list[str]
    to: list[str]
    given: list[str]
    # The kind and the width of an access to global memory.
    access: tuple[str, int] | None


def _instruction(line: str) -> Instruction:
    condition, instruction, operands = re.fullmatch(r"(?:@(!?%\w+)\s+)?(\S+)\s*(.*)", line).groups()
    name, *options = instruction.split(".")
    given = [operand.strip() for operand in re.split(r",(?![^{]*})", operands)]
    to = [] if name in ("st", "red", "bra", "ret", "bar") else REGISTER.findall(given.pop(0))
    access = None
    if "global" in options and name in ("ld", "st", "atom", "red"):
        vector = next((int(each[1:]) for each in options if re.fullmatch(r"v\d", each)), 1)
        access = "load" if name == "ld" else "store", vector * int(re.sub(r"\D", "", options[-1])) // 8
    elif "global" in options and name == "cp":
        access = "load", int(given[1], 0)
    return Instruction(condition, name, options, to, given, access)


@cache
def _instructions(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """Accesses to global memory, branches, all that decides whether they happen, and where labels are."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("}")]
    body = re.sub(r"//.*", "", body)
    # Braces of a line of their own hold the text of inlined assembly.
    lines = (line.strip() for line in re.split(r";|\n", body) if line.strip() not in ("", "{", "}"))
    parsed: list[Instruction | str] = []
    for line in lines:
        if line.startswith("."):
            continue
        if line.endswith(":"):
            parsed.append(line.rstrip(":"))
            continue
        parsed.append(_instruction(line))

    decisive = {"bra", "ret"}
    needed: set[str] = set()
    before = -1
    while before < len(needed):
        before = len(needed)
        for each in parsed:
            if isinstance(each, str):
                continue
            if each.name in decisive or each.access or (each.condition and needed & {*each.to}):
                needed |= {*REGISTER.findall(each.condition or "")}
            if each.name not in decisive and not each.access and needed & {*each.to}:
                needed |= {*REGISTER.findall(" ".join(each.given))}

    kept: list[Instruction] = []
    labels = {}
    for each in parsed:
        if isinstance(each, str):
            labels[each] = len(kept)
        elif each.name in decisive or each.access or needed & {*each.to}:
            kept.append(each)
    return kept, labels


class Thread:
    """One thread of one program of a grid."""

    def __init__(
        self, compiled: Any, grid: tuple[int, ...], program: tuple[int, ...], number: int, arguments: list[Any]
    ) -> None:
        self.instructions, self.labels = _instructions(compiled.asm["ptx"])
        self.values: dict[str, int | None] = {"%tid.x": number, "%tid.y": 0, "%tid.z": 0}
        for axis, programs, of_axis in zip("xyz", (*grid, 1, 1), (*program, 0, 0), strict=False):
            self.values |= {f"%ctaid.{axis}": of_axis, f"%nctaid.{axis}": programs}
        for n, value in enumerate(_run_time_arguments(compiled, arguments)):
            self.values[f"{compiled.metadata.name}_param_{n}"] = value

    def accesses(self) -> Counter[Access]:
        """How many accesses to global memory there are."""
        count: Counter[Access] = Counter()
        n = 0
        while n < len(self.instructions):
            instruction = self.instructions[n]
            n += 1
            holds = self._holds(instruction.condition)
            access = instruction.access
            if access:
                # A mask that depends on what the thread has loaded, or on other threads, may let it through.
                count[Access(*access, happens=holds is not False)] += 1
            if instruction.name in ("bra", "ret"):
                if holds is None:
                    raise ValueError(f"a branch of the kernel depends on what it has loaded: {instruction}")
                if holds:
                    n = self.labels[instruction.given[0]] if instruction.name == "bra" else len(self.instructions)
            elif holds is not False:
                self._compute(instruction, unknown=bool(access) or holds is None)
        return count

    def _holds(self, condition: str | None) -> bool | None:
        """Whether a condition holds. None: it is unknown."""
        if condition is None:
            return True
        value = self.values.get(condition.lstrip("!"))
        return None if value is None else bool(value) != condition.startswith("!")

    def _compute(self, instruction: Instruction, unknown: bool) -> None:
        _, name, options, to, given, _ = instruction
        if name == "ld" and "param" in options:
            result = self.values.get(given[0].strip("[] "))
        else:
            values = [self._value(operand) for operand in given]
            is_integer = name in {*OPERATIONS, "setp"} and not FLOATS & {*options} and len(to) == 1
            result = self._result(name, options, values) if is_integer and None not in values else None
        self.values.update(dict.fromkeys(to, None if unknown else result))

    def _result(self, name: str, options: list[str], values: list[Any]) -> int:
        kind = re.fullmatch(r"([subd])(\d+)", options[-1]) if options else None
        # Registers are kept as signed integers.
        if kind and (kind[1] == "u" or (name == "shr" and kind[1] == "b")):
            size = 1 << int(kind[2])
            factors = [value % size if type(value) is int else value for value in values[:2]]
            values = factors + (values[2:] if "wide" in options else [value % size for value in values[2:]])
        if name == "setp":
            comparison = next(UNSIGNED.get(each, each) for each in options if each in COMPARISONS | UNSIGNED.keys())
            result = bool(getattr(operator, comparison)(*values[:2]))
            return {"and": operator.and_, "or": operator.or_}[options[1]](result, values[2]) if values[2:] else result
        if name in ("mul", "mad") and "hi" in options:
            result = (values[0] * values[1] >> int(kind[2])) + sum(values[2:])
        else:
            result = OPERATIONS[name](*values)
        if name == "not" and options[-1] == "pred":
            return not values[0]
        if not kind or isinstance(result, bool):
            return result
        # The first type is that of the result of a conversion; a wide product has twice the bits of its factors.
        bits = int(options[-2][1:]) if name == "cvt" else int(kind[2]) * (2 if "wide" in options else 1)
        if kind[1] == "s" and name == "bfe" and result >> values[2] - 1:
            result -= 1 << values[2]
        half = 1 << bits - 1
        return (result + half) % (2 * half) - half

    def _value(self, operand: str) -> int | None:
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return int(operand, 0)
        return self.values.get(operand)


def _run_time_arguments(compiled: Any, arguments: list[Any]) -> Iterator[int | None]:
    """The integers that the kernel is given, and None for every other argument, without those compiled in."""
    for argument, kind in zip(arguments, compiled.src.signature.values(), strict=False):
        nested = isinstance(kind, tuple)
        for value, its_kind in zip(argument, kind, strict=True) if nested else [(argument, kind)]:
            if its_kind != "constexpr":
                yield value if isinstance(value, int) else None


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or PRESETS)

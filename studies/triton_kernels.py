"""What the Triton kernels load and hold in registers, compiled for GPUs that need not be there.

    python studies/triton_kernels.py [msd03 msd04]

compiles the kernels of the attention before the last decoder stage of each preset, 3d_fullres, at its batch size.
ptxas says how many registers a thread has, how many bytes it spills, and the shared memory. Loads are counted in the
PTX, by following one thread of some programs all over the grid: its integers are computed, what it loads is unknown.
They are loads of global memory by all threads, also those that a mask switches off, for each element of the output.
"""

import operator
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, product
from math import prod
from pathlib import Path
from typing import Any
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
# Programs to follow along every axis of a grid.
SAMPLE = 4


class Compiler:
    """Takes the place of a GPU's driver: kernels are compiled for `architecture`, and recorded instead of launched."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.launches: list[tuple[Any, tuple[int, ...], list[Any]]] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device.
        return self.architecture

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
                    compiler = Compiler(architecture)
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
    total: Counter[int] = Counter()
    by_name: dict[str, list[tuple[tuple[int, int, int], Counter[int]]]] = {}
    for compiled, grid, arguments in compiler.launches:
        of_launch = loads_of_launch(compiled, grid, arguments)
        total += of_launch
        by_name.setdefault(compiled.metadata.name, []).append((resources(compiled), of_launch))
    for name, launches in by_name.items():
        registers, spilled, shared = (max(values) for values in zip(*(each for each, _ in launches), strict=True))
        loads_of_all = sum((each for _, each in launches), Counter())
        print(
            f"  {name} x {len(launches)}: {registers} registers, {spilled} bytes spilled, {shared} bytes shared, "
            f"{loads_per_output(loads_of_all, outputs)}"
        )
    print(f"  together: {loads_per_output(total, outputs)}")


def loads_per_output(loads: Counter[int], outputs: int) -> str:
    by_width = ", ".join(f"{count / outputs:.2f} of {width} bytes" for width, count in sorted(loads.items()))
    return f"loads per output element {loads.total() / outputs:.2f} ({by_width})"


def loads_of_launch(compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> Counter[int]:
    """Loads of global memory by all threads, by their width in bytes."""
    programs = list(product(*(range(0, count, max(1, count // SAMPLE)) for count in grid)))
    loads = sum((Thread(compiled, grid, program, arguments).loads() for program in programs), Counter[int]())
    threads = prod(grid) * compiled.metadata.num_warps * WARP
    return Counter({width: count * threads // len(programs) for width, count in loads.items()})


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
    return int(a / b) if abs(a) < 2**50 else a // b


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
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "selp": lambda a, b, condition: a if condition else b,
}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


class Thread:
    """The first thread of one program of a grid."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], program: tuple[int, ...], arguments: list[Any]) -> None:
        ptx = compiled.asm["ptx"]
        body = ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("}")]
        body = re.sub(r"//.*", "", body)
        self.lines = [line.strip() for line in re.split(r"[;\n]", body) if line.strip() not in ("", "{", "}")]
        self.labels = {line.rstrip(":"): n for n, line in enumerate(self.lines) if line.endswith(":")}
        self.values: dict[str, int | None] = {f"%tid.{axis}": 0 for axis in "xyz"}
        for axis, programs, number in zip("xyz", (*grid, 1, 1), (*program, 0, 0), strict=False):
            self.values |= {f"%ctaid.{axis}": number, f"%nctaid.{axis}": programs}
        for n, value in enumerate(_run_time_arguments(compiled, arguments)):
            self.values[f"{compiled.metadata.name}_param_{n}"] = value

    def loads(self) -> Counter[int]:
        """How many loads of global memory there are, by their width in bytes."""
        count: Counter[int] = Counter()
        n = 0
        while n < len(self.lines):
            condition, instruction, operands = re.fullmatch(
                r"(?:@(!?%\w+)\s+)?(\S+)\s*(.*)", self.lines[n], re.DOTALL
            ).groups()
            n += 1
            if instruction == "ret":
                if self._holds(condition):
                    break
            elif instruction.startswith("bra"):
                if self._holds(condition):
                    n = self.labels[operands]
            elif instruction.startswith("ld.global"):
                count[_width(instruction)] += 1
            elif not instruction.startswith((".", "$", "st.", "bar")):
                self._compute(instruction, operands)
        return count

    def _holds(self, condition: str | None) -> bool:
        if condition is None:
            return True
        value = self.values.get(condition.lstrip("!"))
        if value is None:
            raise ValueError(f"a branch of the kernel depends on what it has loaded: {condition}")
        return bool(value) != condition.startswith("!")

    def _compute(self, instruction: str, operands: str) -> None:
        to, *given = (operand.strip() for operand in re.split(r",(?![^{]*})", operands))
        name, *options = instruction.split(".")
        if name == "ld" and "param" in options:
            self.values[to] = self.values.get(given[0].strip("[]"))
            return
        values = [self._value(operand) for operand in given]
        is_integer = name in {*OPERATIONS, "setp"} and not {"f32", "f64", "f16", "bf16"} & {*options}
        self.values[to] = self._result(name, options, values) if is_integer and None not in values else None

    def _result(self, name: str, options: list[str], values: list[Any]) -> int:
        if name == "setp":
            comparison = next(UNSIGNED.get(each, each) for each in options if each in COMPARISONS | UNSIGNED.keys())
            result = bool(getattr(operator, comparison)(*values[:2]))
            return {"and": operator.and_, "or": operator.or_}[options[1]](result, values[2]) if values[2:] else result
        if name in ("mul", "mad") and "hi" in options:
            bits = int(options[-1][1:])
            return (values[0] * values[1] >> bits) + sum(values[2:])
        result = OPERATIONS[name](*values)
        bits = re.fullmatch(r"[subd](\d+)", options[-1]) if options and name != "mov" else None
        if not bits or "wide" in options or isinstance(result, bool):
            return result
        half = 1 << int(bits[1]) - 1
        return (result + half) % (2 * half) - half

    def _value(self, operand: str) -> int | None:
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return int(operand, 0)
        return self.values.get(operand)


def _width(instruction: str) -> int:
    vector = re.search(r"\.v(\d)", instruction)
    return (int(vector[1]) if vector else 1) * int(re.search(r"\.[bfsu](\d+)$", instruction)[1]) // 8


def _run_time_arguments(compiled: Any, arguments: list[Any]) -> Iterator[int | None]:
    """The integers that the kernel is given, and None for every other argument, without those compiled in."""
    for argument, kind in zip(arguments, compiled.src.signature.values(), strict=False):
        nested = isinstance(kind, tuple)
        for value, its_kind in zip(argument, kind, strict=True) if nested else [(argument, kind)]:
            if its_kind != "constexpr":
                yield value if isinstance(value, int) else None


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or PRESETS)

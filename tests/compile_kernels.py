"""Compile every kernel ahead of time for named GPUs, on a machine without one, and say what each needs.

    python tests/compile_kernels.py                      # all files of kernels/, for sm_80, sm_90 and sm_100
    python tests/compile_kernels.py pooling --arch 90

What is compiled is what would run: `compile_cases/<file>.py` calls the host functions on meta tensors, each launch is recorded instead of started,
and every distinct one (types, constants, alignment, warps, stages) is built. Fails when one does not build, needs more shared memory than the GPU has,
or spills registers on sm_90.
"""
import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels can't be compiled
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from protonb.kernels import common  # noqa: E402

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "i64",
         torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # most bytes of shared memory that one block can have


def specialise(kernel, arguments):
    """Types, constants and alignment hints of a launch, as Triton itself would derive them."""
    types, constants, aligned = {}, {}, []
    for p in kernel.params:
        v = arguments[p.name]
        if p.is_constexpr or v is None:
            types[p.name], constants[p.name] = "constexpr", v
        elif isinstance(v, torch.Tensor):
            types[p.name] = "*" + TYPES[v.dtype]
            if v.storage_offset() * v.element_size() % 16 == 0:
                aligned.append(p.name)
        elif isinstance(v, float):
            types[p.name] = "fp32"
        elif v == 1 and not p.do_not_specialize:
            types[p.name], constants[p.name] = "constexpr", 1
        else:
            types[p.name] = "i32" if -(2**31) <= v < 2**31 else "i64"
            if v % 16 == 0 and not p.do_not_specialize:
                aligned.append(p.name)
    return types, constants, tuple(aligned)


def record(op):
    """Every distinct launch of a file's cases, by a readable key."""
    found, started = {}, []

    def note(kernel, grid, num_warps=4, num_stages=3, **arguments):
        started.append(kernel.__name__)
        types, constants, aligned = specialise(kernel, arguments)
        key = (op, kernel.__name__, tuple(types.items()), tuple(constants.items()), aligned, num_warps, num_stages)
        found.setdefault(key, name)

    launch, common.launch = common.launch, note
    try:
        for name, thunk in importlib.import_module(f"compile_cases.{op}").cases():
            before = len(started)
            thunk()
            if len(started) == before:
                sys.exit(f"compile_cases/{op}.py: {name} started no kernel")
    finally:
        common.launch = launch
    missing = {n for n in vars(importlib.import_module(f"protonb.kernels.{op}")) if n.endswith("_kernel")} - set(started)
    if missing:
        sys.exit(f"compile_cases/{op}.py starts no {', '.join(sorted(missing))}")
    return found


def build(job):
    """Compile one launch for one architecture -> what it uses, or what went wrong."""
    (op, kernel, types, constants, aligned, num_warps, num_stages), arch = job
    fn = getattr(importlib.import_module(f"protonb.kernels.{op}"), kernel)
    types, constants = dict(types), dict(constants)
    hints = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if n in aligned}
    start = time.time()
    try:
        source = ASTSource(fn=fn, signature=types, constexprs=constants, attrs=hints)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=num_warps, num_stages=num_stages))
    except Exception as e:  # whatever the compiler raises belongs into the report
        return dict(error=f"{type(e).__name__}: {e}"[-600:])
    return dict(resources(made), seconds=time.time() - start)


def resources(made):
    """Registers, spills, stack and shared memory of a compiled kernel, from the assembler that Triton itself uses."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = re.search(r"\.target (sm_\w+)", made.asm["ptx"])[1]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"])
        command = [get_ptxas(int(re.search(r"\d+", arch)[0])).path, "-v", f"-arch={arch}", ptx, "-o", ptx.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern):
        return int((re.search(pattern, said) or [0, 0])[1])

    return dict(registers=number(r"Used (\d+) registers"), spills=number(r"(\d+) bytes spill stores"),
                stack=number(r"(\d+) bytes stack"), shared=made.metadata.shared)


def short(constants):
    """The constants that tell two builds of a kernel apart."""
    return " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in constants if not (v == 1 and not k.isupper()) and v is not None)


def main():
    files = sorted(p.stem for p in (HERE / "compile_cases").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", default=files, help=f"of {', '.join(files)}")
    parser.add_argument("--arch", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    launches = {k: n for op in args.files for k, n in record(op).items()}
    jobs = [(key, arch) for key in launches for arch in args.arch]
    start, bad = time.time(), []
    print(f"{len(launches)} launches, {len(jobs)} builds")
    print(f"{'kernel':34}{'sm':>4}{'warps':>6}{'reg':>5}{'spill':>6}{'stack':>6}{'shared':>8}{'s':>6}  case: constants")
    with ProcessPoolExecutor(args.jobs) as pool:
        for (key, arch), r in zip(jobs, pool.map(build, jobs)):
            op, kernel, _, constants, _, warps, _ = key
            where = f"{launches[key]}: {short(constants)}"
            if "error" in r:
                print(f"{kernel:34}{arch:4}{warps:6}  FAILED  {where}\n    {r['error']}", flush=True)
                bad.append(f"{kernel} sm_{arch} does not build ({where})")
                continue
            print(f"{kernel:34}{arch:4}{warps:6}{r['registers']:5}{r['spills']:6}{r['stack']:6}{r['shared']:8}{r['seconds']:6.1f}  {where}", flush=True)
            if arch == 90 and r["spills"]:
                bad.append(f"{kernel} sm_90 spills {r['spills']} bytes ({where})")
            if r["shared"] > SHARED.get(arch, 1 << 30):
                bad.append(f"{kernel} sm_{arch} wants {r['shared']} bytes of shared memory, has {SHARED[arch]} ({where})")
    print(f"{len(jobs)} builds in {time.time() - start:.0f} s")
    sys.exit("\n".join(bad) if bad else 0)


if __name__ == "__main__":
    main()

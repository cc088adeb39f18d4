"""Compiles the fused kernels for a GPU that need not be here (default: compute capability 9.0, an H100), and prints
what each takes: `python -m tests.tools.compile_kernels [90] [--all]`. With --all each of the tile sizes that are tried
on the GPU."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from parts import attention_triton, linear_attention

POINTERS = ("Q", "K", "V", "OUT", "GRAD", "DQ", "DK", "DV")


def compiled(kernel, kind: str, constants: dict, warps: int, stages: int, capability: int):
    """As a call with contiguous tensors of `kind` would compile it."""
    signature, known, facts = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[(i,)] = "constexpr", constants[name]
        elif name in POINTERS or name in ("LSE", "DELTA", "MASK"):
            signature[name] = {"LSE": "*fp32", "DELTA": "*fp32", "MASK": "*i1"}.get(name, "*" + kind)
            facts[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("s"):  # strides: the last one is 1, the others are multiples of 16
            signature[name], known[(i, 3)] = ("i32", "i32", "i32", "constexpr"), 1
            facts |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    return triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=facts),
                          target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def main(capability: int, blocks: list) -> None:
    for kernel in (attention_triton.forward_kernel, attention_triton.rows_kernel, attention_triton.columns_kernel):
        for e, kind, causal, masked in ((64, "bf16", True, False), (72, "fp16", False, True),
                                        (128, "bf16", False, False),
                                        (64, "fp32", True, True)):
            x = torch.empty(1, 1, 64, e)
            known = attention_triton.settings(x, x, x if masked else None, causal)
            for rows, columns, warps, stages in blocks:
                constants = {key: known[key] for key in ("W", "CAUSAL", "MASKED")} | {"ROWS": rows, "COLUMNS": columns}
                found = compiled(kernel.fn, kind, constants if masked else constants | {"MASK": None}, warps, stages,
                                 capability)
                report(kernel.fn.__name__, e, kind, (rows, columns), found)
    for kernel in (linear_attention.linear_forward, linear_attention.linear_backward):
        report(kernel.__name__, 32, "bf16", (64, 32), compiled(kernel, "bf16", {"E": 32, "ROWS": 64}, 4, 3, capability))


def report(name: str, e: int, kind: str, tile: tuple, found) -> None:
    units = "wgmma" if "wgmma" in found.asm["ptx"] else "mma" if "mma.sync" in found.asm["ptx"] else "none"
    shared = found.metadata.shared / 1024
    print(f"{name:16} width {e:3} {kind} tile {tile}: {shared:5.0f} KiB shared, tensor cores by {units}")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    main(numbers[0] if numbers else 90,
         attention_triton.BLOCKS if "--all" in sys.argv else attention_triton.BLOCKS[3:4])

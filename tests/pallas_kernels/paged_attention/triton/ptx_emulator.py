"""Runs the few PTX instructions that unpack codes, on numpy registers."""

import jax.numpy as jnp
import numpy as np


def run_ptx(text, inputs):
    """Runs straight-line PTX on numpy registers, `u32[n]` each, from `$1` on; returns `$0`."""
    registers = {f"${i + 1}": np.asarray(x, np.uint32) for i, x in enumerate(inputs)}
    halves = lambda x: x.view(np.float16).astype(np.float64).reshape(-1, 2)
    packed = lambda x: np.ascontiguousarray(x.astype(np.float16)).view(np.uint32).reshape(-1)

    def read(name):
        if name in registers:
            return registers[name]
        return np.full(inputs[0].shape, int(name, 0), np.uint32)

    for line in text.strip("{}\n").split("\n"):
        op, _, rest = line.split("//")[0].strip().rstrip(";").partition(" ")
        if op == ".reg":
            continue
        target, *names = [x.strip() for x in rest.split(",")]
        args = [read(x) for x in names]
        if op == "prmt.b32":
            bytes_ = np.stack([a >> np.uint32(8 * i) & 255 for a in args[:2] for i in range(4)])
            picks = [read(names[2]) >> np.uint32(4 * i) & 7 for i in range(4)]
            each = np.arange(len(bytes_[0]))
            value = sum(bytes_[pick, each] << np.uint32(8 * i) for i, pick in enumerate(picks))
        elif op == "lop3.b32":
            value = np.zeros_like(args[0])
            for case in range(8):
                if int(names[3], 0) >> case & 1:
                    signs = [a if case >> (2 - i) & 1 else ~a for i, a in enumerate(args[:3])]
                    value |= signs[0] & signs[1] & signs[2]
        elif op in ("shr.u32", "shl.b32"):
            value = args[0] >> args[1] if op == "shr.u32" else args[0] << args[1]
        elif op == "and.b32":
            value = args[0] & args[1]
        elif op == "sub.s32":
            value = args[0] - args[1]
        elif op == "mov.b32":
            value = args[0]
        elif op == "fma.rn.f16x2":
            a, b, c = map(halves, args)
            value = packed(a * b + c)
        elif op == "add.rn.f16x2":
            value = packed(halves(args[0]) + halves(args[1]))
        elif op == "mul.rn.f16x2":
            value = packed(halves(args[0]) * halves(args[1]))
        else:
            raise AssertionError(line)
        registers[target] = value.astype(np.uint32)
    return registers["$0"]


def run_asm(order, text, args, constraints, pack, dtype=jnp.float16):
    """`elementwise_inline_asm` by the emulator; elements fill registers in the given `order`."""
    del constraints
    registers = []
    for x in args:
        x = np.ascontiguousarray(np.asarray(x).reshape(-1)[order])
        if x.dtype.itemsize == 2:
            registers.append(x.view(np.uint32))
        else:
            registers += [np.ascontiguousarray(x[i::pack]).view(np.uint32) for i in range(pack)]
    found = np.empty(order.size, dtype)
    found[order] = run_ptx(text, registers).view(found.dtype)
    return jnp.asarray(found.reshape(args[0].shape))

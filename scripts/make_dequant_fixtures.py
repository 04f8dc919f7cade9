#!/usr/bin/env python3
"""Writes the dequantisation fixture of crates/model.

Needs the packages `gguf` and `numpy` (gguf 0.19.0 and numpy 2.4.6 made the committed file):

    python scripts/make_dequant_fixtures.py crates/model/src/dequant/fixtures/all_types.gguf

For each type the GGUF file holds a tensor `TYPE` of a few stored blocks and an F32 tensor
`TYPE.expected`, the values that `gguf.quants.dequantize` gives for them. Metadata has one key of
every value type. Written by the reference package, it also checks the GGUF reader.
"""

import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType
from gguf.quants import dequantize, quantize

SEED = 20250714
# Bytes of the f16 fields (scales, minimums) of a block: random bits there would give NaN.
F16_FIELDS = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
    T.IQ4_NL: [0], T.IQ4_XS: [0], T.MXFP4: [],
}  # fmt: skip
# What the package cannot quantise to.
READ_ONLY = [T.IQ4_NL, T.IQ4_XS, T.MXFP4]
SPECIAL = [0.0, -0.0, 1.0, -2.0, 65504.0, 6e-8, -6.1e-5, 0.333]


def stored_blocks(ty: T, rng: np.random.Generator) -> np.ndarray:
    """Rows of stored bytes: random blocks, and for types it can quantise to, a normal sample."""
    elements, size = GGML_QUANT_SIZES[ty]
    if ty in (T.F32, T.F16, T.BF16):
        values = np.concatenate([rng.normal(size=56), SPECIAL]).astype(np.float32)
        return quantize(values.reshape(2, 32), ty).view(np.uint8)
    count = 4 if elements == 32 else 2
    blocks = rng.integers(0, 256, size=(count, size), dtype=np.uint8)
    for i in range(count):
        for field in F16_FIELDS[ty]:
            # One subnormal scale in each type; the others of both signs and usual size.
            scale = 3e-7 if i == 1 else rng.normal() * 0.05
            blocks[i, field : field + 2] = np.array([scale], np.float16).view(np.uint8)
        if ty == T.MXFP4:
            # Powers of two: the smallest, which are no normal numbers, and usual ones.
            blocks[i, 0] = [0, 1, 118, 127][i]
    if elements == 32 and ty not in READ_ONLY:
        sample = rng.normal(size=(1, 64)).astype(np.float32)
        blocks = np.concatenate([blocks, quantize(sample, ty).reshape(2, size)])
    return blocks


def main() -> None:
    rng = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(sys.argv[1], "fixture")
    numbers = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768,
        "uint32": 2**32 - 1, "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63),
        "float32": 0.5, "float64": 0.1,
    }  # fmt: skip
    for name, value in numbers.items():
        ty = GGUFValueType[name.upper()]
        writer.add_key_value(f"test.{name}", value, ty)
        writer.add_key_value(f"test.{name}_array", [value, 1], GGUFValueType.ARRAY, ty)
    writer.add_bool("test.bool", True)
    writer.add_array("test.bool_array", [True, False])
    writer.add_string("test.string", "größe ≤ 1")
    writer.add_array("test.string_array", ["", "a", "▁the"])
    for ty in [T.F32, T.F16, T.BF16, *F16_FIELDS]:
        stored = stored_blocks(ty, rng)
        expected = np.ascontiguousarray(dequantize(stored, ty), dtype=np.float32)
        assert np.isfinite(expected).all(), ty
        writer.add_tensor(ty.name, stored, raw_dtype=ty)
        writer.add_tensor(f"{ty.name}.expected", expected)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

"""The lint over compiled kernels finds what was wrong on a GPU: on texts of a few lines, and on kernels compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.attention.configs import BY_ARCHITECTURE, GENERAL, PRODUCTS, refusal
from kernels.runtime import INTERPRETING, TRITON_INSTALLED
from tests.kernels.machine import UNWRITTEN, compare_descriptors, instructions, ptx_products, reused_registers

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Two products of shared memory, the second 64 bytes (4 units of 16) on; and what an assembler may make of them.
PTX = """
	mov.b32 	%r1, global_smem;
	bfe.u32 	%r2, %r1, 4, 14;
	cvt.u64.u32 	%rd1, %r2;
	or.b64 	%rd2, %rd1, 4611686293305294848;
	add.s64 	%rd3, %rd1, 4611686293305294852;
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r5,%r6}, %rd2, %rd2, 0, 1, 1, 0, 1;
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r5,%r6}, %rd3, %rd2, %p4, 1, 1, 0, 1;
"""
GOOD = (
    "UMOV UR4, 0x400",
    "USHF.R.U32.HI UR4, URZ, 0x4, UR4",
    "UMOV UR5, 0x40000040",
    "UMOV UR6, UR4",
    "UMOV UR7, UR5",
    "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4].tnspB, RZ, !UPT",
    "UMOV UR12, URZ",
    "UIADD3 UR8, UP0, UR4, 0x4, URZ",
    "UIADD3.X UR9, UR12, 0x40000040, URZ, UP0, !UPT",
    "UMOV UR10, UR6",
    "UMOV UR11, UR7",
    "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0",
)


def code(*lines: str):
    return instructions(
        "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    )


def lost(*lines: str) -> list[str]:
    return compare_descriptors(PTX, code(*lines), 4).lost


def changed(old: str, new: str) -> tuple[str, ...]:
    assert old in GOOD
    return tuple(new if line == old else line for line in GOOD)


def test_faithful_machine_code_keeps_every_descriptor():
    assert [hex(product.a) for product in ptx_products(PTX, 0)] == ["0x4000004000000040", "0x4000004000000044"]
    found = compare_descriptors(PTX, code(*GOOD), 4)
    assert (found.lost, found.compared, found.unknown) == ([], 4, 0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # As ptxas 12.8 did: the low word added to the high one; a register that nobody wrote; the stack's address.
        (
            "UIADD3.X UR9, UR12, 0x40000040, URZ, UP0, !UPT",
            "UIADD3.X UR9, UR4, 0x40000040, URZ, UP0, !UPT",
            "0x40000080",
        ),
        ("UIADD3 UR8, UP0, UR4, 0x4, URZ", "UIADD3 UR8, UP0, UR44, 0x4, URZ", "nobody wrote"),
        ("UMOV UR10, UR6", "R2UR UR10, R1", "nobody wrote"),
        ("UMOV UR6, UR4", "UMOV UR6, 0x1", "B 0x"),
    ],
)
def test_a_lost_operand_is_found(old, new, said):
    found = lost(*changed(old, new))
    assert found
    assert said in found[0]


def test_an_operand_from_the_stacks_address_spreads():
    found = compare_descriptors(PTX, code(*changed("UMOV UR4, 0x400", "R2UR UR4, R1")), 4)
    assert len(found.lost) == 4
    assert UNWRITTEN < 0


def test_another_number_of_products_is_said():
    with pytest.raises(ValueError, match="2 products in PTX and 1"):
        compare_descriptors(PTX, code(*GOOD[:7]), 4)


LOOP = (
    "LDS.128 R216, [R10]",
    "HGMMA.64x128x16.F32.BF16 R88, R216, gdesc[UR4], R88, gsb0",
    "IADD3 R8, R8, 0x20, RZ",
    "@P0 BRA 0x0000",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
)


def test_registers_that_a_product_still_reads_are_found_across_a_loop():
    found = reused_registers(code(*LOOP))
    assert len(found) == 1
    assert "0x0 LDS writes R216, R217, R218, R219" in found[0]


def test_registers_may_be_written_once_the_product_was_waited_for():
    waited = (*LOOP[:2], "WARPGROUP.DEPBAR.LE gsb0, 0x0", *LOOP[2:])
    assert not reused_registers(code(*waited))
    # One later group may still run: the wait then covers this one.
    later = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
    assert not reused_registers(code(*LOOP[:2], later, "WARPGROUP.DEPBAR.LE gsb0, 0x1", *LOOP[2:]))
    assert reused_registers(code(*LOOP[:2], "WARPGROUP.DEPBAR.LE gsb0, 0x1", *LOOP[2:]))


@pytest.mark.parametrize("architecture", [None, *BY_ARCHITECTURE])
def test_no_row_of_the_launch_table_is_of_a_kind_that_was_wrong(architecture):
    nvidia = not isinstance(architecture, str)
    for (kernel, itemsize), rows in (GENERAL | BY_ARCHITECTURE.get(architecture, {})).items():
        for widest, config in rows.items():
            prior = min(widest, 64)
            assert not refusal(kernel, itemsize, (widest, prior), config, nvidia), (kernel, itemsize, widest, config)


def test_kinds_that_were_wrong_are_refused():
    assert "fewer than 64 px" in refusal("gradient", 2, (64, 64), (32, 8), True)
    assert "registers" in refusal("gram", 2, (128, 128), (64, 8), True)
    assert not refusal("normalise", 2, (512, 512), (32, 8), True)
    assert not refusal("gradient", 2, (128, 64), (16, 8), False)
    assert "gram" in PRODUCTS


@pytest.mark.skipif(INTERPRETING, reason="already inside the interpreter lane")
@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
def test_compiled_launches_are_told_apart():
    """Row 8 was wrong on a GPU (gradient, 32 px); the table's launch for the same case is clean."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rules = {}
    for state in ("was", "now"):
        command = [sys.executable, str(HERE / "lint.py"), "--measured", state, "--row", "8"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        rules[state] = {finding["rule"] for finding in json.loads(done.stdout)["findings"]}
    assert "swizzle" in rules["was"]
    assert not rules["now"]
